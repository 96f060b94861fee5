"""Cost of recording: a forward pass with all hooks, with attention weights only, with none.

    python benchmarks/trace_cost.py [MODEL] [--rounds 7]          (needs the torch extra)

One thread, CPU time, alternating runs, medians. Memory is allocated as in `glassllama walkthrough`;
the time to release it is included. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before PyTorch, as the command does

import torch

from glassllama import load
from glassllama.walkthrough.tracing import retain_freed_memory, trace

LENGTHS = (17, 128, 512)  # tokens
RECORDED = {"all hooks": ["*"], "attention weights": ["layers.*.attention.weights"]}


def seconds(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    retain_freed_memory()  # as the walkthrough does
    model = load(chosen.model, backend="torch").model
    rows = []
    for length in LENGTHS:
        ids = torch.arange(1, length + 1)
        ways: dict[str, Callable[[], object]] = {"none": lambda ids=ids: model(ids[None])}
        for name, hooks in RECORDED.items():
            ways[name] = lambda ids=ids, hooks=hooks: trace(model, ids.tolist(), hooks=hooks)
        spent: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            for _ in range(chosen.rounds):
                for name, work in ways.items():
                    spent[name].append(seconds(work))
        base = median(spent["none"])
        row = {name: median(times) / base - 1 for name, times in spent.items() if name != "none"}
        rows.append({"tokens": length, "forward_s": base, **row})
        shares = "   ".join(f"{name} +{share:.0%}" for name, share in row.items())
        print(f"{length:4} tokens   {base * 1000:6.0f} ms   {shares}")
    print(json.dumps({"model": chosen.model, "added": rows}))


if __name__ == "__main__":
    main()
