"""`glassllama perplexity`: how well a model predicts a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glassllama.base.errors import GlassError
from glassllama.cli.console import note, print_json, progress_bars
from glassllama.cli.options import (
    BackendOptions,
    Json,
    ModelArgument,
    ModelOptions,
    Offline,
    PreferPth,
    Specials,
    note_specials,
)

WINDOW = 512  # tokens: usual in tables of quantized models


def perplexity(
    model: ModelArgument,
    backend_options: BackendOptions,
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="A UTF-8 text.")],
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Tokens of a window.",
            show_default=f"{WINDOW}, or the model's context if that is shorter",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens between windows.", show_default="half of it"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Use only the first N tokens.")
    ] = None,
    specials: Specials = False,
    offline: Offline = False,
    pth: PreferPth = False,
    json: Json = False,
) -> None:
    """Measure how well a model predicts a text: perplexity and bits per byte, lower is better.

    Windows slide over the text. Each token is scored once, after at least WINDOW - STRIDE tokens of
    context; every window begins with the model's begin-of-text token, if it has one.
    """
    from glassllama.generation.perplexity import score

    text = read_text(file)
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


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises GlassError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GlassError(f"{path}: not UTF-8 at byte {error.start}") from None
