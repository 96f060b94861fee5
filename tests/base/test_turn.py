"""One call at a time: threads wait, a thread's own second call is refused, a child begins anew."""

from __future__ import annotations

import os
import threading

import pytest

from glassllama.base.errors import GenerationError
from glassllama.base.turn import Turn, in_turn


class Counter:
    def __init__(self) -> None:
        self.turn, self.inside, self.most, self.calls = Turn(), 0, 0, 0

    @in_turn
    def call(self, wait: threading.Event | None = None, again: bool = False) -> int:
        self.inside += 1
        self.most = max(self.most, self.inside)
        if wait is not None:
            wait.wait()
        try:
            return self.call() if again else self.calls
        finally:
            self.inside -= 1
            self.calls += 1


def test_threads_wait_for_each_other() -> None:
    counter = Counter()
    threads = [threading.Thread(target=counter.call) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counter.calls, counter.most) == (20, 1)


def test_a_call_within_a_call_is_refused_and_the_next_is_not() -> None:
    counter = Counter()
    with pytest.raises(GenerationError, match="already in a step in this thread"):
        counter.call(again=True)
    assert counter.call() == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_has_its_turn_though_another_thread_had_it() -> None:
    counter, wait = Counter(), threading.Event()
    thread = threading.Thread(target=counter.call, args=(wait,))
    thread.start()
    while not counter.inside:
        pass
    pid = os.fork()
    if pid == 0:
        import signal

        signal.alarm(10)
        os._exit(counter.call())
    wait.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
