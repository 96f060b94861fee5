"""`glassllama tokenize`: a text as the model sees it, and back."""

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
from glassllama.cli.options import Json, Which
from glassllama.native.jit import code_cache

if TYPE_CHECKING:
    from glassllama.base.interfaces import Tokenizer

LONGEST_TABLE = 10_000  # rows whose widths are looked for
PIECE_WIDTH = 20
PART = 2**20  # characters
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model"}
MODEL_FILES = {"config.json", "params.json"}
MODEL_ENDINGS = {".safetensors", ".gguf", ".pth"}


def tokenize(
    which: Which,
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="The text; read from stdin where it is left out."),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="TEXT holds ids; print the text they stand for.")
    ] = False,
    specials: Annotated[
        bool,
        typer.Option(
            "--specials",
            help="Read control tokens such as <|eot_id|> in TEXT as such, not as text.",
        ),
    ] = False,
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin with the model's begin-of-text token, if any.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the tokens of a text: id, piece and bytes of each."""
    text = text_or_stdin(text, "TEXT")
    tokenizer = tokenizer_at(which.path())
    if decode:
        ids = read_ids(text)
        text = tokenizer.decode(ids)
    else:
        ids = tokenizer.encode(text, bos=bos, specials=specials)
    if json:
        pieces = (piece(tokenizer, id) for id in ids)
        print_json_parts({"model": which.model, "text": text, "ids": ids, "pieces": pieces})
    elif decode:
        print(text)
    else:
        print_tokens(tokenizer, ids)
        note(f"\n{len(ids)} tokens, {len(text)} characters, {len(text.encode())} bytes")
    for line in (*getattr(tokenizer, "notes", []), *code_cache.notes):
        note(line)


def print_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    """A line for each: a table as wide as it has to be, or of fixed widths where it is long."""
    rows = ((id, repr(piece(tokenizer, id)), tokenizer.token_bytes(id).hex(" ")) for id in ids)
    if len(ids) <= LONGEST_TABLE:
        print_table(["id>", "piece", "bytes"], [*rows])
        return
    width = len(str(tokenizer.vocab_size))
    for id, shown, raw in rows:
        print(f"{id:{width}}  {shown:{PIECE_WIDTH}}  {raw}")


def print_json_parts(value: Mapping[str, str | Iterable[object]]) -> None:
    """What `print_json` prints, a part at a time: texts and lists may be long."""
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
    """A model's tokenizer, or that of a folder which holds nothing else (train-tokenizer)."""
    from glassllama.weights.open import open_checkpoint
    from glassllama.weights.tokenizer import tokenizer_from_folder

    files = list(path.iterdir()) if path.is_dir() else []
    has_model = any(f.name in MODEL_FILES or f.suffix.lower() in MODEL_ENDINGS for f in files)
    if not has_model and any(file.name in TOKENIZER_FILES for file in files):
        return tokenizer_from_folder(path)
    return open_checkpoint(path).tokenizer


def piece(tokenizer: Tokenizer, id: int) -> str:
    """A token's bytes as text; � stands for the bytes of a character that is not whole."""
    return tokenizer.token_bytes(id).decode("utf-8", errors="replace")


def read_ids(text: str) -> list[int]:
    """`1 2 3`, `1,2,3` or `[1, 2, 3]` -> ids. Raises TokenizerError that names the odd word."""
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    for word in words:
        if not word.isascii() or not word.isdigit():
            raise TokenizerError(f"--decode: {quoted(word)} is no token id; want whole numbers")
    return [int(word) for word in words]
