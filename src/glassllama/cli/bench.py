"""`glassllama bench`: how fast a model runs here, and how fast it could run at best."""

from __future__ import annotations

import time
from dataclasses import asdict
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glassllama.base.errors import GlassError, MissingExtraError
from glassllama.cli.options import How, Json, ModelArgument, Offline, PreferPth, Which
from glassllama.cli.screen import note, print_json, print_table, progress_bars

if TYPE_CHECKING:
    from glassllama.cli.measure import Measured, Rates


class PeerName(StrEnum):
    llama_cpp = "llama.cpp"


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
    vs: Annotated[
        PeerName | None,
        typer.Option(metavar="PEER", help="llama.cpp: in turns with it, on the same GGUF file."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add the result to FILE, as one line of JSON."),
    ] = None,
    offline: Offline = False,
    pth: PreferPth = False,
    json: Json = False,
) -> None:
    """Measure a model on this machine: load, first token, prefill, decode, memory.

    The bound is the memory's speed, measured at the same time: every new token has to read all
    weights once, so decode cannot be faster than that.
    """
    from glassllama.cli.measure import measure, threads_of

    llm = how.load(Which(model=model, offline=offline, pth=pth))
    peer = None if vs is None else LlamaCpp(llm.path, threads_of(how), room=prompt + new)
    with progress_bars() as bar:
        measured = measure(llm, how, prompt, new, runs, bar("measuring", "runs"), peer)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(dumps(asdict(measured)) + "\n")
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
    if m.peer and m.peer_prefill_tok_s and m.peer_decode_tok_s:
        prefill, decode = m.peer_prefill_tok_s, m.peer_decode_tok_s
        rows += [
            (m.peer, f"prefill {prefill:,.0f} tok/s, decode {decode:,.1f} tok/s"),
            (
                "ours to theirs",
                f"prefill {m.prefill_tok_s / prefill:.2f}, decode {m.decode_tok_s / decode:.2f}",
            ),
        ]
    print_table(["", ""], rows)
    note(f"\n{m.model} on the {m.backend}, {m.threads} threads, medians of {m.runs} runs")


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on the same file with as many threads."""

    def __init__(self, path: Path, threads: int, *, room: int) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise MissingExtraError("the comparison with llama.cpp", "bench") from None
        if path.suffix != ".gguf":
            raise GlassError(f"{path}: llama.cpp reads GGUF files only, leave out --vs")
        self.name = f"llama.cpp ({llama_cpp.__version__})"
        self._model = llama_cpp.Llama(
            str(path), n_ctx=room, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._logits = llama_cpp.llama_get_logits_ith

    def run(self, ids: list[int], new: int) -> Rates:
        """One prompt, then `new` tokens one by one."""
        import numpy as np

        from glassllama.cli.measure import Rates

        self._model.n_tokens = 0  # the next eval forgets what came before
        started = time.perf_counter()
        self._model.eval(ids)
        read = time.perf_counter()
        for _ in range(new):
            logits = self._logits(self._model.ctx, -1)
            likeliest = int(np.ctypeslib.as_array(logits, (self._model.n_vocab(),)).argmax())
            self._model.eval([likeliest])
        return Rates(len(ids) / (read - started), new / (time.perf_counter() - read))
