"""The scheduler: all requests of a model share one KV cache and one forward pass per step.

A step computes the next id of every running request and a chunk of the prompts that wait, so that a
long prompt does not stop the others (continuous batching: Orca, Yu et al., 2022; chunked prefill:
Sarathi, Agrawal et al., 2023). A request's ids depend on its prompt, settings and seed alone: an
executor whose logits depend on the batch runs one sequence at a time.

Ids only: text, and stop strings, which are text, belong to the caller.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import Executor, NewTokens, Output, Progress
from glassllama.base.locks import REENTRANT_CALL, NonReentrantLock, synchronized
from glassllama.generation.request import GenerationSettings, Request, Timings, TokenEvent
from glassllama.generation.speculation import Lookup, Speculation

CACHED_SEQUENCES = 1  # of finished requests whose keys and values stay for what begins alike
INTERRUPTED = "an exception came while the next id was chosen; ask again"


@dataclass(slots=True)
class Planned:
    """What one request gives to a forward pass."""

    request: Request
    tokens: NewTokens
    guess: list[int]  # the ids of `tokens` after the first, if they are guessed
    num_new_before: int

    @property
    def num_new(self) -> int:
        """How many ids came of it."""
        return self.request.num_new - self.num_new_before


class Scheduler:
    """Runs requests over one executor. One thread steps at a time; others wait."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.lock = NonReentrantLock()
        self._cache = executor.new_cache()
        self._requests: dict[int, Request] = {}  # in the order of their arrival
        self._numbers = itertools.count()
        self._cached: deque[int] = deque()  # sequences of finished requests
        self._returned: list[TokenEvent] = []  # by the next step

    def add(self, request: Request) -> int:
        """Run a request from the next step on -> its number."""
        request.number = next(self._numbers)
        self._requests[request.number] = request
        return request.number

    def cancel(self, request: Request) -> None:
        """End a request: it has no further events. No effect if it has ended."""
        request.live = False
        with suppress(GenerationError):  # in the middle of a step: the next one frees it
            self._free()

    @property
    def is_idle(self) -> bool:
        return not self._requests

    @synchronized
    def _free(self) -> None:
        """Forget requests that have ended or whose owner is gone."""
        for request in [*self._requests.values()]:
            if not request.live or request.is_abandoned:
                self._end(request)

    @synchronized
    def step(self) -> list[TokenEvent]:
        """One forward pass -> the events of requests that have no `events` of their own.

        Raises what the executor raises. After any exception the next step goes on from there: no
        event is lost, and no id is computed from tokens that the model has not read.
        """
        for request in [*self._requests.values()]:
            if request.choosing:
                self._deliver(request, failed(request, GenerationError(INTERRUPTED)))
            if not request.live or request.is_abandoned:
                self._end(request)
        started = time.perf_counter()
        plan = self._plan([r for r in self._requests.values() if not r.is_waiting])
        if self.executor.capabilities.batch_invariant and plan:
            self._forward(plan)
        else:
            for part in plan:
                self._forward([part])
        measure(plan, time.perf_counter() - started)
        for part in plan:
            if not part.request.live:
                self._end(part.request)
        returned, self._returned = self._returned, []
        return returned

    # --- one step ---------------------------------------------------------------------------------

    def _plan(self, active: list[Request]) -> list[Planned]:
        """What each request gives to the forward pass: its last id, or a chunk of what is unread.

        The chunks of all prompts together have `prefill_chunk` ids; those who came first are served
        first. An executor that is not batch invariant gets whole chunks, always cut alike.
        """
        capabilities, plan = self.executor.capabilities, list[Planned]()
        budget = capabilities.prefill_chunk
        for request in active:
            unread, guess = self._unread(request), list[int]()
            if len(unread) == 1:
                if len(active) == 1 and capabilities.batch_invariant:
                    guess = self._guess(request)
            elif budget <= 0:
                continue
            is_prefix = request.prefix and request.num_read == 0  # read in one step, as a whole
            size = len(unread) if is_prefix else budget
            ids, all_read = unread[:size], len(unread) <= size
            if len(unread) > 1:
                budget = budget - len(ids) if capabilities.batch_invariant else 0
            else:
                ids, all_read = unread[:1], True
            output: Output = "none" if not all_read else "all" if guess else "last"
            tokens = NewTokens(request.sequence, [*ids, *guess], output, request.rows, is_prefix)
            plan.append(Planned(request, tokens, guess, request.num_new))
        return plan

    def _unread(self, request: Request) -> list[int]:
        """The ids that the model has not read: the last one, or all of a prompt.

        A request whose window is full is shifted: what is left has other positions, so it is read
        again from an empty sequence.
        """
        cache = self._cache
        if request.sequence < 0:
            request.sequence = cache.add()
        if len(request.window) >= request.context:
            request.shift()
            cache.rewind(request.sequence, 0)
        length, most = cache.length(request.sequence), len(request.window) - 1
        if length > most:  # an exception came after the forward pass, before an id was chosen
            cache.rewind(request.sequence, most)
            length = most
        request.num_read = length
        return request.window[length:]

    def _guess(self, request: Request) -> list[int]:
        """Ids that may follow, to be checked in the same pass; mostly none."""
        if not (request.settings.speculation and request.num_new):
            return []
        if request.speculation is None:
            request.speculation = Speculation(Lookup(request.window))
        guess = request.speculation.guess(request.num_left - 1)
        return [*itertools.takewhile(lambda id: id >= 0, guess)]  # rows of images never follow

    def _forward(self, plan: list[Planned]) -> None:
        """Compute the planned tokens, and choose the next ids where a prompt is read to its end."""
        logits = self.executor.forward([part.tokens for part in plan], self._cache)
        first = 0
        for part in plan:
            request, last = part.request, first + part.tokens.num_outputs
            request.num_read += len(part.tokens.ids)
            if last > first:
                self._choose(part, logits[first:last])
            if part.guess:
                request.num_read = min(request.num_read, len(request.window) - 1)
                self._cache.rewind(request.sequence, request.num_read)
            if part.num_new_before == 0 and request.num_new:
                request.timings.reused_tokens += self._cache.reused(request.sequence)
            first = last

    def _choose(self, part: Planned, logits: NDArray[np.float32]) -> None:
        """The next id of a request from (1, V) logits; with guesses, one after each that was right.

        An id after a guess that cannot be chosen is computed again by itself, after those before.
        """
        request = part.request
        for n, guessed in enumerate([*part.guess, None]):
            request.choosing = True
            try:
                event = request.choose(logits[n])
            except GenerationError as error:
                if n:
                    request.choosing = False
                    break
                event = failed(request, error)
            self._deliver(request, event)
            request.choosing = False
            if event.id != guessed or not request.live:
                break
            request.timings.accepted += 1
        request.timings.drafted += len(part.guess)

    def _deliver(self, request: Request, event: TokenEvent) -> None:
        (self._returned if request.events is None else request.events).append(event)

    def _end(self, request: Request) -> None:
        """Forget a request, and its keys and values unless they are to be kept."""
        del self._requests[request.number]
        request.live = False
        if request.sequence < 0:
            return
        if request.keep and self.executor.capabilities.shares_prefixes:
            self._cached.append(request.sequence)
        else:
            self._cache.remove(request.sequence)
        while len(self._cached) > CACHED_SEQUENCES:
            self._cache.remove(self._cached.popleft())


def measure(plan: list[Planned], seconds: float) -> None:
    """Add the time of a step to the timings of those who took part, and learn about guessing.

    Where a group of requests both reads prompts and decodes, by the numbers of ids.
    """
    for timings in {id(part.request.timings): part.request.timings for part in plan}.values():
        own = [part for part in plan if part.request.timings is timings]
        decoding = [part for part in own if part.num_new_before]
        ids = sum(len(part.tokens.ids) for part in own)
        share = sum(len(part.tokens.ids) for part in decoding) / ids
        timings.prefill_s += (1 - share) * seconds
        timings.decode_s += share * seconds
        timings.decode_tokens += sum(part.num_new for part in decoding)
    for part in plan:
        if (speculation := part.request.speculation) is not None:
            chosen = part.request.window[len(part.request.window) - part.num_new :]
            if len(plan) == 1:
                speculation.learn(chosen, len(part.tokens.ids), seconds)
            else:
                for token in chosen:
                    speculation.lookup.add(token)


def failed(request: Request, error: GenerationError) -> TokenEvent:
    """The last event of a request that cannot go on."""
    request.live = request.choosing = False
    return TokenEvent(request.number, request.row, -1, dropped_tokens=request.dropped, error=error)


class Generation(Iterator[TokenEvent]):
    """The events of some requests as they are made; `cancel(row)` ends one, `close()` all of them.

    Nothing is computed ahead of what is asked for. Iterating raises GenerationError when the logits
    hold no number to choose by. After an exception, whatever it was, there are no further events.

    No generator: to drop one that has not ended runs Python, in which a Ctrl-C would be lost.
    """

    def __init__(
        self, scheduler: Scheduler, requests: Sequence[Request], progress: Progress | None = None
    ) -> None:
        self.requests = list(requests)
        self.timings = Timings(prompt_tokens=sum(len(request.prompt) for request in requests))
        self._scheduler, self._progress = scheduler, progress
        self._events: deque[TokenEvent] = deque()
        self._begun = self._stepping = False
        for row, request in enumerate(requests):
            request.row, request.timings, request.events = row, self.timings, self._events
            request.owner = weakref.ref(self)

    def __next__(self) -> TokenEvent:
        while True:
            while self._events:
                event = self._events.popleft()
                if self.requests[event.row].cancelled:  # perhaps just now, by the caller
                    continue
                if event.error is not None:
                    self.close()
                    raise event.error
                self.timings.new_tokens += 1
                return event
            if not any(request.live for request in self.requests):
                raise StopIteration
            self._step()

    def cancel(self, row: int) -> None:
        request = self.requests[row]
        if request.live or not request.cancelled:  # once is enough, unless it was interrupted
            request.cancelled = True
            self._scheduler.cancel(request)

    def close(self) -> None:
        for row in range(len(self.requests)):
            self.cancel(row)

    def _step(self) -> None:
        if self._stepping:
            raise GenerationError(REENTRANT_CALL)
        self._stepping = True
        try:
            if not self._begun:
                for request in self.requests:
                    if request.live:
                        self._scheduler.add(request)
                self._begun = True
                self._report()
            reading = not self.timings.new_tokens
            self._scheduler.step()
            if reading:
                self._report()
        except BaseException:
            self.close()
            raise
        finally:
            self._stepping = False

    def _report(self) -> None:
        if self._progress is not None:
            read = sum(min(request.num_read, len(request.prompt)) for request in self.requests)
            self._progress(read, self.timings.prompt_tokens)


def generate(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | Sequence[GenerationSettings],
    *,
    progress: Progress | None = None,
) -> Generation:
    """Continue every prompt (ids), with a scheduler of its own -> the events.

    `settings` are for all prompts, or one for each. `progress` gets the numbers of prompt ids read
    and of all. Raises GenerationError at once: no prompt, or what `Request.new` refuses.
    """
    if not prompts:
        raise GenerationError("no prompts: expected at least one")
    each = [settings] * len(prompts) if isinstance(settings, GenerationSettings) else [*settings]
    if len(each) != len(prompts):
        raise GenerationError(f"{len(each)} settings for {len(prompts)} prompts: expected as many")
    requests = [
        Request.new(executor, *both, name=f"prompt {n}")
        for n, both in enumerate(zip(prompts, each, strict=True))
    ]
    return Generation(Scheduler(executor), requests, progress)
