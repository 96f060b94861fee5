"""Two checkouts of this project, measured in turns: is the new one as fast as the old one?

    python benchmarks/old_new.py OLD NEW MODEL… [--pairs 10] [--prompt 512] [--new-tokens 64]

OLD and NEW are folders of checkouts (`git worktree add --detach FOLDER COMMIT`). Every run is a
process of its own: `glassllama bench MODEL` with the checkout's sources, old and new one after the
other, and in the other order in every second pair. For each figure it prints the median of the
ratios new / old of the pairs, and the lower limit of that median at 95 % confidence: the largest
order statistic k with P(Binomial(pairs, 1/2) < k) ≤ 5 %. The limit is that of the sign test, so it
assumes nothing about how the ratios are distributed. The machine must be idle.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

Speeds = dict[str, float]  # "prefill 512" → tokens per second


def lower_limit(values: list[float], confidence: float = 0.95) -> float:
    """The lower limit of the median at this confidence, one-sided, from order statistics."""
    n, below, k = len(values), 0.0, 0
    while below + math.comb(n, k) / 2**n <= 1 - confidence:
        below += math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        raise SystemExit(f"{n} pairs are too few for a limit at {confidence:.0%}: at least 5")
    return sorted(values)[k - 1]


def measure(checkout: Path, model: str, options: list[str]) -> Speeds:
    """One process of that checkout: tokens per second of every line of its bench."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "line.jsonl"
        words = [sys.executable, "-m", "glassllama", "bench", model, *options, "--out", str(out)]
        subprocess.run(
            words, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        rows = json.loads(out.read_text())["rows"]
    return {f"{row['what']} {row['tokens']}": row["tok_s"] for row in rows}


def compare(old: Path, new: Path, model: str, pairs: int, options: list[str]) -> None:
    """Print a line for each figure of one model."""
    measure(old, model, options), measure(new, model, options)  # compiled, packed, in memory
    ratios: dict[str, list[float]] = {}
    rates: dict[str, list[tuple[float, float]]] = {}
    for pair in range(pairs):
        order = (old, new) if pair % 2 == 0 else (new, old)
        found = {checkout: measure(checkout, model, options) for checkout in order}
        for figure in found[new]:
            ratios.setdefault(figure, []).append(found[new][figure] / found[old][figure])
            rates.setdefault(figure, []).append((found[old][figure], found[new][figure]))
        print(f"  pair {pair + 1}: " + ", ".join(f"{f} {r[-1]:.3f}" for f, r in ratios.items()),
              file=sys.stderr, flush=True)  # fmt: skip
    for figure, values in ratios.items():
        before, after = (median(side) for side in zip(*rates[figure], strict=True))
        print(f"{Path(model).name:24} {figure:12} old {before:8.1f} new {after:8.1f} tok/s   "
              f"ratio {median(values):.3f}, lower limit {lower_limit(values):.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--prompt", default="512")
    parser.add_argument("--new-tokens", default="64", dest="tokens")
    flags = parser.parse_args()
    options = ["--prompt", flags.prompt, "--new", flags.tokens, "--runs", "3"]
    for model in flags.models:
        named = str(Path(model).absolute()) if Path(model).exists() else model
        compare(flags.old.absolute(), flags.new.absolute(), named, flags.pairs, options)


if __name__ == "__main__":
    main()
