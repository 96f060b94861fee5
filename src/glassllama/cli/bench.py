"""`glassllama bench`: the speed of a model on this machine, and its limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from glassllama.base.errors import quoted
from glassllama.base.machine import gigabytes
from glassllama.cli.console import naming, note, print_json, print_table, progress_bars
from glassllama.cli.options import JSON, MODEL, OFFLINE, PTH, BackendOptions, ModelOptions, option

if TYPE_CHECKING:
    from glassllama.benchmark import BenchmarkResult, CellResult

FULL_GRID = {"prompt": "128,512,2048", "context": "0,1024,4096", "batch": "1,4,8"}


class Peer(StrEnum):
    llama_cpp = "llama.cpp"
    as_stored = "llama.cpp-as-stored"


def number_list(text: str) -> str:
    """Check `128,512`. Raises BadParameter."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise typer.BadParameter(f"expected whole numbers with commas between, got {quoted(text)}")
    return text


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured."""

    prompt: str = option(
        "512", metavar="N,…", callback=number_list, help="Prefill: tokens of a prompt."
    )
    context: str = option(
        "0", metavar="N,…", callback=number_list, help="Decode: tokens of context."
    )
    batch: str = option("1", metavar="N,…", callback=number_list, help="Decode: sequences.")
    grid: bool = option(
        False, "--grid",
        help="Instead: prompts of {prompt}, contexts of {context}, batches of {batch}.".format(
            **FULL_GRID
        ),
    )  # fmt: skip
    new: int = option(64, min=1, metavar="N", help="Decode: new tokens.")
    runs: int = option(3, min=1, metavar="N", help="The median of N runs counts.")


def bench(
    backend_options: BackendOptions,
    bench_options: BenchOptions,
    model: str = MODEL,
    vs: list[Peer] | None = typer.Option(
        None, metavar="PEER",
        help="Alternate with llama.cpp on the same GGUF file. llama.cpp-as-stored: without "
        "repacking the weights for this CPU. Repeatable.",
    ),
    out: Path | None = typer.Option(
        None, metavar="FILE", help="Append the result to FILE as one line of JSON."
    ),
    offline: bool = OFFLINE,
    pth: bool = PTH,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Measure a model on this machine: load, first token, prefill, decode, memory.

    The limits of this machine are measured too. Every new token reads all weights once, so decode
    of one sequence is limited by memory bandwidth, prefill by arithmetic. Prompts are random
    tokens; speculation is off.
    """
    from glassllama.benchmark import Grid, LlamaCppRunner, benchmark, used_threads

    llm = backend_options.load(ModelOptions(model=model, offline=offline, pth=pth))
    threads = used_threads(backend_options.threads)
    peers = [LlamaCppRunner(llm.path, threads, repack=peer is Peer.llama_cpp) for peer in vs or ()]
    cells = FULL_GRID if bench_options.grid else asdict(bench_options)
    prompts, contexts, batches = ([*map(int, cells[name].split(","))] for name in FULL_GRID)
    grid = Grid(
        prompts=prompts, contexts=contexts, batches=batches, new=bench_options.new,
        runs=bench_options.runs,
    )  # fmt: skip
    with progress_bars() as bar:
        result = benchmark(
            llm, grid, peers=peers, threads=threads, exact=backend_options.exact,
            on_cpu=backend_options.device == "cpu", progress=bar("measuring", "cells"),
        )  # fmt: skip
    if out is not None:
        with naming(out), out.open("a", encoding="utf-8") as file:
            file.write(dumps(asdict(result)) + "\n")
    if json:
        print_json(asdict(result))
    else:
        print_result(result)


def print_result(r: BenchmarkResult) -> None:
    print_table(["", ""], machine_rows(r))
    print()
    peers = [f"{peer['name']}>" for peer in r.peers]
    ratio = ["ratio to best>"] if peers else []
    titles = ["", "tok/s>", "used>", "of the limit>", *peers, *ratio]
    print_table(titles, [cell_row(r, row) for row in r.rows])
    tier = f", kernels for {r.tier}" if r.tier else ""
    note(f"\n{r.model} on the {r.backend} backend, {r.threads} threads{tier}, {r.runs} runs")


def machine_rows(r: BenchmarkResult) -> list[tuple[str, str]]:
    """Load time, memory, and the limits of the machine."""
    rows = [("load", f"{r.load_s:.2f} s"), ("first token", f"{r.first_token_s:.2f} s")]
    rows += [
        (peer["name"], f"load {peer['load_s']:.2f} s, first token {peer['first_token_s']:.2f} s")
        for peer in r.peers
    ]
    rows.append(("read per token", gigabytes(r.bytes_per_token)))
    if r.bandwidth is not None and r.bound_tok_s is not None:
        rows += [
            ("memory bandwidth", f"{r.bandwidth / 1e9:.1f} GB/s"),
            ("limit of decode", f"{r.bound_tok_s:,.0f} tok/s"),
        ]
    rows += [(f"peak {name}", f"{peak / 1e9:,.0f} GOP/s") for name, peak in r.peaks.items()]
    if r.peak_memory is not None:
        with_peers = " including llama.cpp" if r.peers else ""
        rows.append(("peak memory", gigabytes(r.peak_memory) + with_peers))
    return rows


def cell_row(r: BenchmarkResult, row: CellResult) -> list[str]:
    what = f"{row.what} {row.tokens:,}"
    if row.context:
        what += f" after {row.context:,}"
    if row.batch > 1:
        what += f", {row.batch} sequences"
    if row.bytes_s is not None:  # decode
        used = f"{row.bytes_s / 1e9:.1f} GB/s"
        share = None if r.bandwidth is None else row.bytes_s / r.bandwidth
    else:
        used = f"{row.ops_s / 1e9:,.0f} GOP/s"
        share = None if r.peak is None else row.ops_s / r.peaks[r.peak]
    cells = [what, f"{row.tok_s:,.1f}", used, "" if share is None else f"{share:.0%}"]
    cells += [f"{rate:,.1f}" for rate in row.peers]
    return [*cells, *([] if row.ratio is None else [f"{row.ratio:.2f}"])]
