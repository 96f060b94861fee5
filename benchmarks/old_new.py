"""Compare the speed of two checkouts of this project, measured alternately.

    python benchmarks/old_new.py OLD NEW MODEL… [--pairs 40] [--prompt 128] [--new-tokens 32]

OLD and NEW are folders of checkouts (`git worktree add --detach FOLDER COMMIT`). Each runs in a
process that has loaded the model. They process a prompt and generate tokens one after the other,
and in reverse order in every second pair. Other load on a machine lasts for seconds, so it affects
both measurements of a pair. Prints, for prefill and decode, the median of the ratios new / old of
the pairs, and the lower limit of that median at 95 % confidence: the largest order statistic k with
P(Binomial(pairs, 1/2) < k) ≤ 5 %. This is the limit of the sign test, which assumes nothing about
the distribution of the ratios. The machine must be idle.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median


def lower_limit(values: list[float], confidence: float = 0.95) -> float:
    """The lower limit of the median at this confidence, one-sided, from order statistics."""
    n, below, k = len(values), 0.0, 0
    while below + math.comb(n, k) / 2**n <= 1 - confidence:
        below += math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        raise SystemExit(f"{n} pairs are too few for a limit at {confidence:.0%}; use at least 5")
    return sorted(values)[k - 1]


WORKER = """
import sys, time
try:
    from glassllama.weights.checkpoint import open_checkpoint
except ImportError:  # older commits
    from glassllama.weights.open import open_weights as open_checkpoint
from glassllama.weights.pack import pack

engine = pack(open_checkpoint(sys.argv[1]))
prompt, count = int(sys.argv[2]), int(sys.argv[3])
for line in sys.stdin:
    if hasattr(engine, "forward"):
        from glassllama.base.interfaces import NewTokens

        cache = engine.new_cache()
        sequence = cache.add()
        feed = lambda ids: engine.forward([NewTokens(sequence, ids)], cache)
    else:  # older commits
        cache = engine.new_cache(1, prompt + count)
        feed = lambda ids: engine.next_logits([ids], cache)
    ids = [(int(line) * 7919 + 31 * n) % engine.config.vocab_size for n in range(prompt)]
    begun = time.perf_counter()
    logits = feed(ids)
    read = time.perf_counter()
    for _ in range(count):
        logits = feed([int(logits[0].argmax())])
    written = time.perf_counter()
    del cache, feed
    print(prompt / (read - begun), count / (written - read), flush=True)
"""


class Checkout:
    """A process that runs the code of a checkout, with the model in memory."""

    def __init__(self, folder: Path, model: str, prompt: int, count: int) -> None:
        words = [sys.executable, "-c", WORKER, model, str(prompt), str(count)]
        environment = os.environ | {"PYTHONPATH": str(folder / "src")}
        self._process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self, seed: int) -> tuple[float, float]:
        """Tokens per second of prefill and of decode."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        read, written = self._process.stdout.readline().split()
        return float(read), float(written)

    def close(self) -> None:
        self._process.communicate()


def compare(folders: tuple[Path, Path], model: str, flags: argparse.Namespace) -> None:
    """Print one line for prefill and one for decode of a model."""
    both = [Checkout(folder, model, flags.prompt, flags.tokens) for folder in folders]
    for each in both:
        each.measure(0)  # compiles, packs, loads
    pairs: list[list[tuple[float, float]]] = []
    for pair in range(1, flags.pairs + 1):
        order = (0, 1) if pair % 2 else (1, 0)
        found = {n: both[n].measure(pair) for n in order}
        pairs.append([found[0], found[1]])
    for each in both:
        each.close()
    for figure, count in enumerate((flags.prompt, flags.tokens)):
        old, new = ([pair[n][figure] for pair in pairs] for n in (0, 1))
        ratios = [after / before for before, after in zip(old, new, strict=True)]
        print(
            f"{Path(model).name:32} {('prefill', 'decode')[figure]} {count:<4} "
            f"old {median(old):6.1f} new {median(new):6.1f} tok/s   "
            f"ratio {median(ratios):.3f}, lower limit {lower_limit(ratios):.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32, dest="tokens")
    flags = parser.parse_args()
    for model in flags.models:
        folders = (flags.old.absolute(), flags.new.absolute())
        compare(folders, str(Path(model).absolute()), flags)


if __name__ == "__main__":
    main()
