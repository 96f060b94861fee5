"""`glassllama bench`: how fast a model runs here, and how fast it could run at best."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from glassllama.cli.options import How, Json, ModelArgument, Offline, PreferPth, Which
from glassllama.cli.screen import note, print_json, print_table, progress_bars

if TYPE_CHECKING:
    from glassllama.cli.measure import Measured


def bench(
    model: ModelArgument,
    how: How,
    prompt: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of the prompt, for the prefill.")
    ] = 512,
    new: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens made, for the decode.")
    ] = 128,
    runs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs, of which the median counts.")
    ] = 3,
    offline: Offline = False,
    pth: PreferPth = False,
    json: Json = False,
) -> None:
    """Measure a model on this machine: load, first token, prefill, decode, memory.

    The bound is the memory's speed, measured at the same time: every new token has to read all
    weights once, so decode cannot be faster than that.
    """
    from glassllama.cli.measure import measure

    llm = how.load(Which(model=model, offline=offline, pth=pth))
    with progress_bars() as bar:
        measured = measure(llm, how, prompt, new, runs, bar("measuring", "runs"))
    if json:
        print_json(asdict(measured))
    else:
        print_measured(measured)


def print_measured(m: Measured) -> None:
    from glassllama.base.machine import gigabytes

    rows = [
        ("load", f"{m.load_s:.2f} s"),
        ("first token", f"{m.first_token_s:.2f} s"),
        ("prefill", f"{m.prefill_tok_s:,.0f} tok/s, {m.prefill_tokens} tokens"),
        ("decode", f"{m.decode_tok_s:,.1f} tok/s, {m.decode_tokens} tokens"),
        ("read per token", gigabytes(m.bytes_per_token)),
    ]
    if m.bandwidth is not None and m.bound_tok_s is not None:
        share = m.decode_tok_s / m.bound_tok_s
        rows += [
            ("memory reads", f"{m.bandwidth / 1e9:.1f} GB/s"),
            ("bound", f"{m.bound_tok_s:,.0f} tok/s, of which decode reaches {share:.0%}"),
        ]
    if m.peak_memory is not None:
        rows.append(("peak memory", gigabytes(m.peak_memory)))
    print_table(["", ""], rows)
    note(f"\n{m.model} on the {m.backend}, {m.threads} threads, medians of {m.runs} runs")
