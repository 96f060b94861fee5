"""Forks while another thread is in a step: every child must give the same answer as its parent.

usage: python forked.py CHILDREN
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import warnings

from glassllama.generation import GenerationSettings, generate
from handmade_engines import SMALL, handmade
from rows import Rows

SECONDS = 60  # seconds; a child that takes longer has a deadlock


def main(children: int) -> None:
    warnings.simplefilter(
        "ignore", DeprecationWarning
    )  # warnings about forks with threads, which this script tests
    chance = random.Random(1)
    engine = handmade()
    ids = [chance.randrange(SMALL.vocab_size) for _ in range(200)]

    def answer() -> list[int]:
        settings = GenerationSettings(max_tokens=5)
        return [step.id for step in generate(engine, [ids[:100]], settings)]

    def work() -> None:
        while True:
            Rows(engine).next_logits([ids])

    wanted = answer()
    threading.Thread(target=work, daemon=True).start()
    born = []
    for _ in range(children):
        time.sleep(chance.uniform(0, 0.02))
        pid = os.fork()
        if pid == 0:
            signal.alarm(SECONDS)
            os._exit(0 if answer() == wanted == answer() else 1)
        born.append(pid)
    failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in born)
    assert answer() == wanted
    print(f"{children} children, {failed} failed", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
