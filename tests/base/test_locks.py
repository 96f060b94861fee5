"""synchronized methods: threads wait, reentrant calls are refused, forks are not blocked."""

from __future__ import annotations

import os
import threading

import pytest

from glassllama.base.errors import GenerationError
from glassllama.base.locks import NonReentrantLock, synchronized


class Counter:
    def __init__(self) -> None:
        self.lock, self.running, self.max_running, self.calls = NonReentrantLock(), 0, 0, 0

    @synchronized
    def call(self, wait: threading.Event | None = None, reenter: bool = False) -> int:
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        if wait is not None:
            wait.wait()
        try:
            return self.call() if reenter else self.calls
        finally:
            self.running -= 1
            self.calls += 1


def test_threads_wait_for_each_other() -> None:
    counter = Counter()
    threads = [threading.Thread(target=counter.call) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counter.calls, counter.max_running) == (20, 1)


def test_a_reentrant_call_is_refused_and_the_next_call_works() -> None:
    counter = Counter()
    with pytest.raises(GenerationError, match="already in a step in this thread"):
        counter.call(reenter=True)
    assert counter.call() == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_call_although_another_thread_held_the_lock() -> None:
    counter, wait = Counter(), threading.Event()
    thread = threading.Thread(target=counter.call, args=(wait,))
    thread.start()
    while not counter.running:
        pass
    pid = os.fork()
    if pid == 0:
        import signal

        signal.alarm(10)
        os._exit(counter.call())
    wait.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
