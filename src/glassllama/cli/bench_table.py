"""What `glassllama bench` prints: a line a cell, and the bounds that they are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glassllama.base.machine import gigabytes
from glassllama.cli.console import note, print_table

if TYPE_CHECKING:
    from glassllama.cli.bench_runner import Measured, Row


def print_measured(m: Measured) -> None:
    print_table(["", ""], facts(m))
    print()
    titles = ["", "tok/s>", "used>", "of the bound>", *(f"{p['name']}>" for p in m.peers)]
    print_table(
        [*titles, *(["ours to the best>"] if m.peers else [])], [cells(m, r) for r in m.rows]
    )
    tier = f", kernels of tier {m.tier}" if m.tier else ""
    note(f"\n{m.model} on the {m.backend}, {m.threads} threads{tier}, medians of {m.runs} runs")


def facts(m: Measured) -> list[tuple[str, str]]:
    """Load, memory, and what the machine can do."""
    rows = [("load", f"{m.load_s:.2f} s"), ("first token", f"{m.first_token_s:.2f} s")]
    rows += [
        (peer["name"], f"load {peer['load_s']:.2f} s, first token {peer['first_token_s']:.2f} s")
        for peer in m.peers
    ]
    rows.append(("read per token", gigabytes(m.bytes_per_token)))
    if m.bandwidth is not None and m.bound_tok_s is not None:
        rows += [
            ("memory reads", f"{m.bandwidth / 1e9:.1f} GB/s"),
            ("bound of decode", f"{m.bound_tok_s:,.0f} tok/s"),
        ]
    rows += [(name, f"{peak / 1e9:,.0f} GOP/s at best") for name, peak in m.peaks.items()]
    if m.peak_memory is not None:
        with_peers = " with the peers'" if m.peers else ""
        rows.append(("peak memory", gigabytes(m.peak_memory) + with_peers))
    return rows


def cells(m: Measured, row: Row) -> list[str]:
    what = f"{row.what} {row.tokens:,}"
    if row.context:
        what += f" after {row.context:,}"
    if row.batch > 1:
        what += f", {row.batch} rows"
    used = (
        f"{row.ops_s / 1e9:,.0f} GOP/s" if row.bytes_s is None else f"{row.bytes_s / 1e9:.1f} GB/s"
    )
    share = share_of_bound(m, row)
    shown = [what, f"{row.tok_s:,.1f}", used, "" if share is None else f"{share:.0%}"]
    shown += [f"{rate:,.1f}" for rate in row.peers]
    return [*shown, *([] if row.ratio is None else [f"{row.ratio:.2f}"])]


def share_of_bound(m: Measured, row: Row) -> float | None:
    """Of the memory's speed for a decode, of the processor's for a prefill."""
    if row.bytes_s is not None:
        return None if m.bandwidth is None else row.bytes_s / m.bandwidth
    return None if m.peak is None else row.ops_s / m.peaks[m.peak]
