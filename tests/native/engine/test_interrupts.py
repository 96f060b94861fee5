"""An exception at any moment of a call, a fork during one, a call within one.

Ctrl-C raises at any instruction at which Python's interpreter checks for signals. Here it is raised
at each of them in turn, deterministically; a child process is interrupted by real signals.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassllama.base.errors import GenerationError
from glassllama.generation import Generation, GenerationSettings, Request, Scheduler, generate
from glassllama.native.engine.executor import Engine
from glassllama.native.engine.thread_pool import ASLEEP
from handmade_engines import SMALL, handmade, with_windows
from interrupting import Interruption
from long_mode import LONG
from rows import Rows

HERE = Path(__file__).parent
IDS = [int(i) for i in np.random.default_rng(5).integers(0, SMALL.vocab_size, 300)]
MOMENTS = 1 if LONG else 59  # every moment, or one of so many


@pytest.fixture(scope="module")
def engine() -> Engine:
    return handmade()


@pytest.fixture(scope="module", params=["no window", "windows"])
def any_engine(request: pytest.FixtureRequest) -> Engine:
    return handmade() if request.param == "no window" else with_windows(30)


def history(engine: Engine, cache: Any) -> list[Callable[[], Any]]:
    """Calls that cross page boundaries, share, copy, merge and truncate pages."""
    return [
        lambda: cache.next_logits([IDS[:130], IDS[:130], IDS[:66]]),
        lambda: cache.next_logits([[1], [1], IDS[66:130]]),
        lambda: cache.truncate(1, 100),
        lambda: cache.next_logits([[], IDS[100:129], [2]]),
        lambda: cache.truncate(0, 64),
        lambda: cache.next_logits([IDS[200:202], [3], []]),
    ]


def moments(first: int) -> range:
    return range(first, 100_000, MOMENTS)


def test_a_call_interrupted_at_any_moment_is_complete_or_has_no_effect(any_engine: Engine) -> None:
    """Other caches that share its pages are unchanged."""
    engine = any_engine
    other = Rows(engine)
    other.next_logits([IDS[:120]])
    cache = Rows(engine, 3)
    wanted = []
    for call in history(engine, cache):
        before = [*cache.lengths]
        wanted.append((call(), before, [*cache.lengths]))
    other_logits = other.next_logits([[9]])
    other.truncate(0, 120)
    del cache
    for at in moments(1):
        cache = Rows(engine, 3)
        interruption = Interruption(at)
        for call, (logits, before, after) in zip(history(engine, cache), wanted, strict=True):
            try:
                came = call() if interruption.came else interruption.run(call)
            except KeyboardInterrupt:
                assert cache.lengths in (before, after)
                came = call() if cache.lengths == before else None
            if came is not None:
                fed = [n for n in range(3) if after[n] != before[n]]
                assert (came[fed] == logits[fed]).all(), at
            assert cache.lengths == after
        assert (other.next_logits([[9]]) == other_logits).all()
        other.truncate(0, 120)
        if not interruption.came:
            assert at > 1000
            break


@pytest.mark.parametrize("speculation", [False, True])
def test_after_an_interrupt_at_any_moment_the_next_answer_is_the_same(
    engine: Engine, speculation: bool
) -> None:
    prompt = IDS[:40] * 2
    settings = GenerationSettings(max_tokens=6, speculation=speculation)
    scheduler = Scheduler(engine)

    def answer() -> list[int]:
        request = Request.new(engine, prompt, settings)
        request.keep = True
        return [event.id for event in Generation(scheduler, [request])]

    wanted = answer()
    for at in moments(1):
        interruption = Interruption(at)
        with suppress(KeyboardInterrupt):
            assert interruption.run(answer) == wanted
        assert answer() == wanted, at
        if not interruption.came:
            assert at > 500
            break


def test_after_an_exception_a_generation_has_ended(engine: Engine) -> None:
    steps = generate(engine, [IDS[:5]], GenerationSettings(max_tokens=6))
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        Interruption(40).run(lambda: next(steps))
    assert list(steps) == []


def test_no_finalizers_run_python_code(engine: Engine) -> None:
    """An exception of a signal handler in a finalizer would be lost."""
    cache, own = Rows(engine, 2), handmade()
    cache.next_logits([IDS[:70], IDS[:70]])
    Rows(own).next_logits([[1]])
    steps = generate(engine, [IDS[:5]], GenerationSettings(max_tokens=6))
    next(steps)
    things, ran = [cache, own, steps], list[str]()
    del cache, own, steps

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            ran.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    things.clear()
    sys.setprofile(None)
    assert ran == []


def test_memory_of_a_deleted_cache_is_freed_immediately(engine: Engine) -> None:
    cache = Rows(engine)
    cache.next_logits([IDS])
    assert engine._pages.root.children
    del cache
    assert not [page for page in engine._pages.root.children if page.ids[:5] == IDS[:5]]


def test_a_handler_that_uses_the_engine_in_a_step_gets_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupted call continues and gives the same answer."""
    wanted = Rows(engine).next_logits([IDS[:9]])
    other, run, errors = Rows(engine), engine._run, list[str]()

    def handler(*_: object) -> None:
        for call in (
            lambda: other.next_logits([[1]]), lambda: other.all_logits([1]),
            lambda: other.truncate(0, 0), lambda: next(steps),
        ):  # fmt: skip
            with pytest.raises(GenerationError) as error:
                call()
            errors.append(str(error.value))

    def interrupted(*orders: int) -> None:
        signal.raise_signal(signal.SIGTERM)
        run(*orders)

    steps = generate(engine, [IDS[:9]], GenerationSettings(max_tokens=2))
    before = signal.signal(signal.SIGTERM, handler)
    monkeypatch.setattr(engine, "_run", interrupted)
    try:
        first = next(steps)
        assert (Rows(engine).next_logits([IDS[:9]]) == wanted).all()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert first.id == wanted[0].argmax()
    assert len(errors) >= 8
    assert all("already in a step in this thread" in error for error in errors)


def test_a_sleeping_thread_is_woken_and_works_again(engine: Engine) -> None:
    wanted = Rows(engine).next_logits([IDS])
    if engine.threads > 1:
        block, word = engine._pool.control_block, ASLEEP + 8
        for _ in range(1000):
            if block[word]:
                break
            threading.Event().wait(0.02)
        assert block[word] == 1, "the thread does not sleep"
    for _ in range(3):
        assert (Rows(engine).next_logits([IDS]) == wanted).all()


def child(script: str, *arguments: object, seconds: float) -> str:
    """The output of a script of this folder, which must succeed."""
    done = subprocess.run(
        [sys.executable, HERE / script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-3000:])
    assert "Exception ignored" not in done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupted_by_signals_at_random(threads: int) -> None:
    rounds = 2000 if LONG else 50
    out = child("interrupted.py", rounds, threads, seconds=3000 if LONG else 200)
    assert out.endswith(f"{rounds} rounds, 0 wrong\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_children_forked_during_a_step_can_continue() -> None:
    assert child("forked.py", 12, seconds=200) == "12 children, 0 failed\n"
