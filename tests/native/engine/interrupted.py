"""Answers interrupted by real signals at random moments; the next answer must be the same.

usage: python interrupted.py ROUNDS THREADS
"""

from __future__ import annotations

import faulthandler
import random
import signal
import sys
import time
from typing import Any

from glassllama.generation import GenerationSettings, generate
from handmade_engines import SMALL, handmade


def main(rounds: int, threads: int) -> None:
    faulthandler.enable()
    chance = random.Random(1)
    engine = handmade(threads=threads)
    prompt = [chance.randrange(SMALL.vocab_size) for _ in range(150)]
    settings = GenerationSettings(max_tokens=8, speculation=False)

    def answer() -> list[int]:
        return [step.id for step in generate(engine, [prompt], settings)]

    wanted = answer()
    started = time.perf_counter()
    for _ in range(10):
        assert answer() == wanted
    each = (time.perf_counter() - started) / 10

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    came = wrong = 0
    for _ in range(rounds):
        faulthandler.dump_traceback_later(60, exit=True)  # hangs
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, each))
            answer()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            came += 1
        wrong += answer() != wanted
    assert came > rounds / 4, f"only {came} arrived in time"
    print(f"{rounds} rounds, {wrong} wrong")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
