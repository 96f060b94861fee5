"""`glassllama tokenize`: the tokens of a text, and the text of tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from json import JSONEncoder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glassllama.base.errors import TokenizerError, quoted
from glassllama.cli.console import note, print_table, text_or_stdin
from glassllama.cli.options import Json, ModelOptions, Specials

if TYPE_CHECKING:
    from glassllama.base.interfaces import Tokenizer

MAX_TABLE = 10_000  # rows; above, columns have fixed widths
PIECE_WIDTH = 20
PART = 2**20  # characters that are written at once
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model"}
MODEL_FILES = {"config.json", "params.json"}
MODEL_SUFFIXES = {".safetensors", ".gguf", ".pth"}


def tokenize(
    model_options: ModelOptions,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The text; without it, stdin is read.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="TEXT contains ids; print their text.")
    ] = False,
    specials: Specials = False,
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin with the model's begin-of-text token, if any.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the tokens of a text: id, piece and bytes of each."""
    from glassllama.native.jit import code_cache

    text = text_or_stdin(text, "TEXT")
    tokenizer = tokenizer_at(model_options.path())
    if decode:
        ids = read_ids(text)
        text = tokenizer.decode(ids)
    else:
        ids = tokenizer.encode(text, bos=bos, specials=specials)
    if json:
        pieces = (piece(tokenizer, id) for id in ids)
        write_json_parts({"model": model_options.model, "text": text, "ids": ids, "pieces": pieces})
    elif decode:
        print(text)
    else:
        print_tokens(tokenizer, ids)
        note(f"\n{len(ids)} tokens, {len(text)} characters, {len(text.encode())} bytes")
    for line in (*getattr(tokenizer, "notes", []), *code_cache.notes):
        note(line)


def print_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    """A row per token."""
    rows = ((id, repr(piece(tokenizer, id)), tokenizer.token_bytes(id).hex(" ")) for id in ids)
    if len(ids) <= MAX_TABLE:
        print_table(["id>", "piece", "bytes"], [*rows])
        return
    width = len(str(tokenizer.vocab_size))
    for id, shown, raw in rows:
        print(f"{id:{width}}  {shown:{PIECE_WIDTH}}  {raw}")


def write_json_parts(value: Mapping[str, str | Iterable[object]]) -> None:
    """The same as `print_json`, with bounded memory for long texts and lists."""
    ascii_only = (sys.stdout.encoding or "").lower() != "utf-8"
    dump = JSONEncoder(ensure_ascii=ascii_only).encode
    for n, (key, content) in enumerate(value.items()):
        sys.stdout.write(f"{', ' if n else '{'}{dump(key)}: ")
        if isinstance(content, str):
            parts = (content[at : at + PART] for at in range(0, len(content), PART))
            sys.stdout.writelines(['"', *(dump(part)[1:-1] for part in parts), '"'])
        else:
            items = (f"{', ' if at else ''}{dump(item)}" for at, item in enumerate(content))
            sys.stdout.writelines(chain("[", items, "]"))
    print("}")


def tokenizer_at(path: Path) -> Tokenizer:
    """A model's tokenizer, or that of a folder without a model (from train-tokenizer)."""
    from glassllama.weights.checkpoint import open_checkpoint
    from glassllama.weights.tokenizer import tokenizer_from_folder

    files = list(path.iterdir()) if path.is_dir() else []
    has_model = any(f.name in MODEL_FILES or f.suffix.lower() in MODEL_SUFFIXES for f in files)
    if not has_model and any(file.name in TOKENIZER_FILES for file in files):
        return tokenizer_from_folder(path)
    return open_checkpoint(path).tokenizer


def piece(tokenizer: Tokenizer, id: int) -> str:
    """A token's bytes as text, with � for incomplete characters."""
    return tokenizer.token_bytes(id).decode("utf-8", errors="replace")


def read_ids(text: str) -> list[int]:
    """`1 2 3`, `1,2,3` or `[1, 2, 3]` -> ids. Raises TokenizerError with the invalid word."""
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    for word in words:
        if not word.isascii() or not word.isdigit():
            raise TokenizerError(f"--decode: expected whole numbers, got {quoted(word)}")
    return [int(word) for word in words]
