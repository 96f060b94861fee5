"""`glassllama perplexity`: how well a model predicts a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glassllama.base.errors import GlassError
from glassllama.cli.console import note, print_json, progress_bars
from glassllama.cli.options import (
    How,
    Json,
    ModelArgument,
    Offline,
    PreferPth,
    Specials,
    Which,
    note_specials,
)

if TYPE_CHECKING:
    from glassllama.llm import LLM

WINDOW = 512  # tokens: what is usual in tables of quantised models


def perplexity(
    model: ModelArgument,
    how: How,
    file: Annotated[
        Path, typer.Option("--file", "-f", metavar="FILE", help="A UTF-8 text to be predicted.")
    ],
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Tokens that the model sees at once.",
            show_default=f"{WINDOW}, or the model's context where that is less",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens between windows.", show_default="half of it"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Use the first N tokens of the text only."),
    ] = None,
    specials: Specials = False,
    offline: Offline = False,
    pth: PreferPth = False,
    json: Json = False,
) -> None:
    """Measure how well a model predicts a text: perplexity and bits per byte, lower is better.

    Windows slide over the text. Each token is scored once, seeing at least WINDOW - STRIDE tokens
    before it; every window begins with the model's begin-of-text token, if it has one.
    """
    text = read_text(file)
    llm = how.load(Which(model=model, offline=offline, pth=pth))
    note_specials(llm.tokenizer, text, specials)
    ids = llm.tokenizer.encode(text, specials=specials)
    written = specials and ids[:1] == [llm.tokenizer.bos]  # the windows begin with it anyway
    ids = ids[written:][:tokens]
    if window is None:
        window = min(WINDOW, llm.executor.config.max_seq_len)
    windows = {"window": window, "stride": window // 2 if stride is None else stride}
    result = {"model": model, "file": str(file), **measure(llm, ids, windows)}
    if json:
        print_json(result)
        return
    print(f"perplexity {result['perplexity']:.4f}   bits per byte {result['bits_per_byte']:.4f}")
    note("windows of {window} tokens, every {stride}".format(**windows))
    note("{tokens:,} tokens, {bytes:,} bytes".format(**result))


def measure(llm: LLM, ids: list[int], windows: dict[str, int]) -> dict[str, Any]:
    """The score of a text of these ids, and of how many tokens and bytes it is one."""
    from glassllama.generation.perplexity import score

    with progress_bars() as bar:
        bos, progress = llm.tokenizer.bos, bar("scoring", "tokens")
        scored = score(llm.executor, ids, bos=bos, progress=progress, **windows)
    nbytes = sum(len(llm.tokenizer.token_bytes(id)) for id in ids[scored.unscored :])
    return {
        "tokens": scored.tokens,
        "bytes": nbytes,
        **windows,
        "perplexity": scored.perplexity,
        "bits_per_byte": scored.bits_per_byte(nbytes),
    }


def read_text(path: Path) -> str:
    """A UTF-8 file, whole. Raises GlassError where it is something else."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GlassError(f"{path}: not UTF-8 at byte {error.start}") from None
