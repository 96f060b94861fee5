"""`glassllama tokenize`, `next` and `perplexity`: a text, token by token."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from json import JSONEncoder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from glassllama.base.errors import GlassError, TokenizerError, quoted
from glassllama.cli.console import (
    MAX_PROMPT_BYTES,
    compiler_notes,
    is_terminal,
    note,
    print_json,
    print_table,
    progress_bars,
    text_or_stdin,
)
from glassllama.cli.errors import print_error
from glassllama.cli.options import (
    JSON,
    MODEL,
    OFFLINE,
    PTH,
    SPECIALS,
    BackendOptions,
    ModelOptions,
    note_specials,
)

if TYPE_CHECKING:
    from glassllama.base.interfaces import Tokenizer
    from glassllama.llm import LLM

MAX_TABLE = 10_000  # rows; above, columns have fixed widths
PIECE_WIDTH = 20
PART = 2**20  # characters that are written at once
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model"}
MODEL_FILES = {"config.json", "params.json"}
MODEL_SUFFIXES = {".safetensors", ".gguf", ".pth"}
BAR_WIDTH = 24  # characters for probability 1
ROUNDED = "\nThe engine rounds activations to be fast; 'next --exact' shows exact probabilities."
WINDOW = 512  # tokens: usual in tables of quantized models


def piece(tokenizer: Tokenizer, id: int) -> str:
    """A token's bytes as text, with � for incomplete characters."""
    return tokenizer.token_bytes(id).decode("utf-8", errors="replace")


# --- tokenize -------------------------------------------------------------------------------------


def tokenize(
    model_options: ModelOptions,
    text: str | None = typer.Argument(
        None, metavar="TEXT", help="The text; without it, stdin is read."
    ),
    decode: bool = typer.Option(False, "--decode", help="TEXT contains ids; print their text."),
    specials: bool = SPECIALS,
    bos: bool = typer.Option(
        False, "--bos", help="Begin with the model's begin-of-text token, if any."
    ),
    json: bool = JSON,
) -> None:
    """Show the tokens of a text: id, piece and bytes of each."""
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
    for line in (*getattr(tokenizer, "notes", []), *compiler_notes()):
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


def read_ids(text: str) -> list[int]:
    """`1 2 3`, `1,2,3` or `[1, 2, 3]` -> ids. Raises TokenizerError with the invalid word."""
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    for word in words:
        if not word.isascii() or not word.isdigit():
            raise TokenizerError(f"--decode: expected whole numbers, got {quoted(word)}")
    return [int(word) for word in words]


# --- next -----------------------------------------------------------------------------------------


def next_tokens(
    model_options: ModelOptions,
    backend_options: BackendOptions,
    prompt: str | None = typer.Argument(
        None, metavar="PROMPT",
        help="The text. Without it: asks for texts on a terminal, else reads stdin.",
    ),
    top: int = typer.Option(10, "--top", "-k", min=1, metavar="N", help="Show N tokens."),
    specials: bool = SPECIALS,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Show the most likely next tokens of a text, with their probabilities."""
    interactive = prompt is None and is_terminal(sys.stdin) and not json
    if not interactive:
        prompt = text_or_stdin(prompt, "PROMPT", MAX_PROMPT_BYTES)
    llm = backend_options.load(model_options)
    if prompt is None:
        ask_repeatedly(llm, top, specials)
        return
    show_next(llm, prompt, top, specials, json)
    if llm.backend == "engine" and not backend_options.exact and not json:
        note(ROUNDED)


def ask_repeatedly(llm: LLM, top: int, specials: bool) -> None:
    """One text after the other, until Ctrl-D."""
    from glassllama.cli.repl import line_editing

    note("type the beginning of a text; Ctrl-D leaves")
    with line_editing():
        while True:
            try:
                show_next(llm, input("text> "), top, specials)
            except GlassError as error:
                print_error(str(error))
            except EOFError:
                print()
                return


def show_next(llm: LLM, prompt: str, top: int, specials: bool, json: bool = False) -> None:
    note_specials(llm.tokenizer, prompt, specials)
    completion = llm.generate(prompt, max_tokens=1, logprobs=top, specials=specials, temperature=0)
    assert completion.logprobs is not None
    tokens: list[dict[str, Any]] = [
        {"id": t.id, "piece": piece(llm.tokenizer, t.id), "probability": math.exp(t.logprob)}
        for t in completion.logprobs[0].top
    ]
    if json:
        print_json({"model": llm.name, "prompt_ids": completion.prompt_ids, "next": tokens})
        return
    rows = [
        (f"{p:.1%}", "█" * round(p * BAR_WIDTH), repr(text), id)
        for id, text, p in (token.values() for token in tokens)
    ]
    print_table(["probability>", "", "token", "id>"], rows)
    if prompt.endswith(" "):
        note("\nThe text ends with a space, but tokens begin with one: try it without.")


# --- perplexity -----------------------------------------------------------------------------------


def perplexity(
    backend_options: BackendOptions,
    model: str = MODEL,
    file: Path = typer.Option(..., "--file", "-f", metavar="FILE", help="A UTF-8 text."),
    window: int | None = typer.Option(
        None, min=2, metavar="N", help="Tokens of a window.",
        show_default=f"{WINDOW}, or the model's context if that is shorter",
    ),
    stride: int | None = typer.Option(
        None, min=1, metavar="N", help="Tokens between windows.", show_default="half of it"
    ),
    tokens: int | None = typer.Option(
        None, min=2, metavar="N", help="Use only the first N tokens."
    ),
    specials: bool = SPECIALS,
    offline: bool = OFFLINE,
    pth: bool = PTH,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Measure how well a model predicts a text: perplexity and bits per byte, lower is better.

    Windows slide over the text. Each token is scored once, after at least WINDOW - STRIDE tokens of
    context; every window begins with the model's begin-of-text token, if it has one.
    """
    from glassllama.generation.perplexity import score

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GlassError(f"{file}: not UTF-8 at byte {error.start}") from None
    llm = backend_options.load(ModelOptions(model=model, offline=offline, pth=pth))
    note_specials(llm.tokenizer, text, specials)
    ids = llm.tokenizer.encode(text, specials=specials)
    begins = specials and ids[:1] == [llm.tokenizer.bos]  # every window begins with it anyway
    ids = ids[begins:][:tokens]
    window = min(WINDOW, llm.executor.config.max_seq_len) if window is None else window
    stride = window // 2 if stride is None else stride
    with progress_bars() as bar:
        scored = score(
            llm.executor, ids, window=window, stride=stride, bos=llm.tokenizer.bos,
            progress=bar("scoring", "tokens"),
        )  # fmt: skip
    nbytes = sum(len(llm.tokenizer.token_bytes(id)) for id in ids[scored.unscored :])
    bits_per_byte = scored.bits_per_byte(nbytes)
    if json:
        print_json(
            {"model": model, "file": str(file), "tokens": scored.tokens, "bytes": nbytes,
             "window": window, "stride": stride, "perplexity": scored.perplexity,
             "bits_per_byte": bits_per_byte}
        )  # fmt: skip
        return
    print(f"perplexity {scored.perplexity:.4f}   bits per byte {bits_per_byte:.4f}")
    note(f"windows of {window} tokens, every {stride}")
    note(f"{scored.tokens:,} tokens, {nbytes:,} bytes")
