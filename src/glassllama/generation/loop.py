"""The loop that drives an executor: prefill, then one id per row and round, until rows end.

Ids only: text, and stop strings, which are text, belong to the caller, who may end a row with
`Generation.cancel`.
"""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import GenerationError, quoted
from glassllama.base.interfaces import Cache, Executor, Progress
from glassllama.base.locks import REENTRANT_CALL
from glassllama.generation.sampler import (
    GREEDY,
    Logits,
    Sampler,
    SamplerState,
    likeliest,
    logprobs_of,
    require_whole,
    trouble,
)
from glassllama.generation.speculation import Lookup, Speculation

FinishReason = Literal["stop", "length"]
Overflow = Literal["stop", "shift"]

# Ids of one row fed at once: enough to keep the matrix products busy, few enough that progress
# moves and Ctrl-C is heard. Fixed, so that a row is cut the same way alone and in a batch. An
# executor to whom smaller chunks cost nothing says so: `prefill_chunk`.
PREFILL_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How one row is continued.

    `max_tokens` None means to the end of the context; `context` is the most ids that prompt and
    answer may have together, None the model's own limit. Where `max_tokens` are more than fit,
    `on_overflow` decides: "stop" ends the answer at the end of the context, "shift" drops the older
    half of the text after `bos` and goes on from the rest (see `Row.shift`). `logprobs` is the
    number of likeliest ids to report with each new one (0: the chosen one's logprob only, None:
    nothing). They are of the model's own distribution: before penalties, temperature and filters,
    as in OpenAI's API.
    """

    sampler: Sampler = GREEDY
    max_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False  # go on after a stop id: for measuring
    logprobs: int | None = None
    context: int | None = None
    on_overflow: Overflow = "stop"
    vocabulary: int | None = None  # ids from this one on have no token and are never chosen
    gaps: Sequence[int] = ()  # nor are these
    bos: int | None = None  # the begin-of-text id: never dropped where a prompt begins with it
    speculation: bool = True  # where it can, see `can_speculate`: faster, the same ids

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("logprobs", 0), ("context", 2)):
            if (value := getattr(self, name)) is not None:
                require_whole(name, value, least)
        for name in ("ignore_eos", "speculation"):
            if not isinstance(value := getattr(self, name), bool):
                raise GenerationError(f"{name} must be True or False, got {quoted(value)}")
        if self.on_overflow not in get_args(Overflow):
            raise GenerationError(
                f"on_overflow must be 'stop' or 'shift', got {quoted(self.on_overflow)}"
            )


@dataclass(frozen=True)
class TokenLogprob:
    id: int
    logprob: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One new id of one row. The last step of a row has the reason it ended.

    "stop": `id` is a stop id, and no part of the answer's text; "length": `max_tokens` or the
    context is used up.
    """

    row: int
    id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    dropped_tokens: int = 0  # of this row so far: ids that left a full context


@dataclass
class Timings:
    """Seconds and ids so far; the first id of each row comes out of the prefill."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of prompt_tokens, those that the executor had already computed
    prefill_s: float = 0.0
    new_tokens: int = 0
    decode_tokens: int = 0  # of new_tokens, those made in decode_s
    decode_s: float = 0.0
    drafted: int = 0  # ids guessed, see speculation.py
    accepted: int = 0  # of them, those that the model chose too

    @property
    def prefill_rate(self) -> float | None:
        """Prompt ids computed per second."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_s if self.prefill_s > 0 else None

    @property
    def decode_rate(self) -> float | None:
        """New ids per second, all rows together."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else None


@dataclass
class Row:
    """One prompt being continued."""

    prompt: list[int]
    settings: GenerationSettings
    sampling: SamplerState
    limit: int  # ids it may still be given at most, prompt not counted
    context: int  # the most ids that `window` may have
    window: list[int]  # what the model sees: prompt and answer, but for what was dropped
    dropped: int = 0
    new: int = 0
    last: int = -1
    live: bool = True
    cancelled: bool = False  # from outside

    @property
    def full(self) -> bool:
        return len(self.window) >= self.context

    def shift(self) -> None:
        """Drop the older half of the ids after the begin-of-text id, and at least one."""
        start = 1 if self.window[0] == self.settings.bos and len(self.window) > 2 else 0
        count = max(1, (len(self.window) - start) // 2)
        del self.window[start : start + count]
        self.dropped += count


class Generation(Iterator[Step]):
    """The steps of all rows as they are made, row by row within a round.

    `cancel(row)` ends one row, `close()` all of them; neither costs anything afterwards.
    Iterating raises GenerationError when the logits hold no number to choose by. After an
    exception, whatever it was, there are no further steps.

    No generator: to drop one that has not ended runs Python, in which a Ctrl-C would be lost.
    """

    def __init__(
        self,
        executor: Executor,
        rows: list[Row],
        progress: Progress | None,
        held: list[Cache] | None,
    ) -> None:
        self.timings = Timings(prompt_tokens=sum(len(row.prompt) for row in rows))
        self._executor, self._rows, self._progress = executor, rows, progress
        self._speculation: Speculation | None = None
        self._held = held
        self._cache: Cache | None = None
        self._ready: deque[Step] = deque()
        self._state: Literal["waiting", "busy", "ended"] = "waiting"

    def __next__(self) -> Step:
        while True:
            while self._ready:
                step = self._ready.popleft()
                if not self._rows[step.row].cancelled:  # perhaps just now, by the caller
                    self.timings.new_tokens += 1
                    return step
            if not any(row.live for row in self._rows):
                self.close()
            if self._state == "ended":
                raise StopIteration
            if self._state == "busy":
                raise GenerationError(REENTRANT_CALL)
            self._state = "busy"
            try:
                self._ready.extend(self._begin() if self._cache is None else self._round())
                self._state = "waiting"
            finally:
                if self._state == "busy":
                    self._state, self._cache = "ended", None

    def cancel(self, row: int) -> None:
        self._rows[row].live = False
        self._rows[row].cancelled = True

    def close(self) -> None:
        for row in range(len(self._rows)):
            self.cancel(row)
        if self._state == "waiting":
            self._state, self._cache = "ended", None

    def _begin(self) -> list[Step]:
        """Read the prompts -> the first id of every row."""
        started = time.perf_counter()
        longest = max(min(len(row.prompt) + row.limit, row.context) for row in self._rows)
        cache = self._executor.new_cache(len(self._rows), longest)
        steps = self._choose(self._read(self._unread(cache), cache, self._progress))
        self.timings.prefill_s = time.perf_counter() - started
        self.timings.reused_tokens = getattr(cache, "cached_tokens", 0)
        if self._held is not None:
            self._held[:] = [cache]
        if can_speculate(self._executor, self._rows):
            [row] = self._rows
            self._speculation = Speculation(Lookup([*row.prompt, row.last]))
        self._cache = cache
        return steps

    def _round(self) -> list[Step]:
        """The next id of every living row; of an only row sometimes several."""
        cache = self._cache
        assert cache is not None
        started, guess = time.perf_counter(), self._guess()
        read = 1 + len(guess)
        if guess:
            steps = self._verify(guess, cache)
        else:
            ids = self._unread(cache)
            read = max(map(len, ids))
            steps = self._choose(self._read(ids, cache))
        seconds = time.perf_counter() - started
        self.timings.decode_s += seconds
        self.timings.decode_tokens += len(steps)
        if self._speculation is not None:
            self._speculation.learn([step.id for step in steps], read, seconds)
        return steps

    def _guess(self) -> list[int]:
        if self._speculation is None:
            return []
        [row] = self._rows
        room = min(row.limit - row.new, row.context - len(row.window))
        return self._speculation.guess(room - 1)

    def _verify(self, guess: list[int], cache: Cache) -> list[Step]:
        """Read the guess with the last id; the steps up to the first that differs from it."""
        [row], past, steps = self._rows, cache.lengths[0], list[Step]()
        logits = self._executor.all_logits([row.last, *guess], cache)  # (1 + guess, V)
        for n, guessed in enumerate([*guess, None]):
            try:
                steps.append(_next_step(0, row, logits[n]))
            except GenerationError:
                if not steps:
                    raise
                break  # that id is read again by itself, after those before it were delivered
            if row.last != guessed:
                break
            self.timings.accepted += 1
            if not row.live:
                break
        self.timings.drafted += len(guess)
        cache.truncate(0, past + len(steps))
        return steps

    def _unread(self, cache: Cache) -> list[list[int]]:
        """The ids of every living row that the model has not read: its last, or all of its window.

        A row whose window is full is shifted: what is left has other positions, so it is read again
        from an empty cache.
        """
        for number, row in enumerate(self._rows):
            if row.live and row.full:
                row.shift()
                cache.truncate(number, 0)
        lengths = cache.lengths
        return [row.window[lengths[n] :] if row.live else [] for n, row in enumerate(self._rows)]

    def _read(
        self, ids: list[list[int]], cache: Cache, progress: Progress | None = None
    ) -> Sequence[Logits] | NDArray[np.float32]:
        """Feed every row its ids, in chunks -> the logits after each row's last id, (V,) each."""
        size = getattr(self._executor, "prefill_chunk", PREFILL_CHUNK)
        longest, total, done = max(map(len, ids)), sum(map(len, ids)), 0
        if progress is not None:
            progress(0, total)
        elif 0 < longest <= size:
            return self._executor.next_logits(ids, cache)  # (B, V)
        last = [np.empty(0, dtype=np.float32)] * len(ids)
        start = 0
        while start < longest:
            size = getattr(self._executor, "prefill_chunk", PREFILL_CHUNK)
            chunks = [row[start : start + size] for row in ids]
            logits = self._executor.next_logits(chunks, cache)  # (B, V)
            for row, chunk in enumerate(chunks):
                if chunk:
                    last[row] = logits[row].copy()  # the executor may use its array again
            start, done = start + size, done + sum(map(len, chunks))
            if progress is not None:
                progress(done, total)
        return last

    def _choose(self, logits: Sequence[Logits] | NDArray[np.float32]) -> list[Step]:
        """One step of every living row, from its logits (V,)."""
        living = [(n, row) for n, row in enumerate(self._rows) if row.live]
        return [_next_step(n, row, logits[n]) for n, row in living]


def _next_step(number: int, row: Row, logits: Logits) -> Step:
    logits = logits[: row.settings.vocabulary]
    if row.settings.gaps:
        logits = logits.copy()
        logits[row.settings.gaps] = -np.inf
    try:
        row.last = row.sampling.choose(logits)
    except GenerationError:
        raise GenerationError(
            f"row {number}: the logits after position {len(row.prompt) + row.new - 1} hold "
            f"{trouble(logits)}; the weights are damaged or overflow in this precision "
            "(validate the file, or load it with exact=True)"
        ) from None
    settings = row.settings
    row.new += 1
    row.window.append(row.last)
    reason: FinishReason | None = None
    if row.last in settings.stop_ids and not settings.ignore_eos:
        reason = "stop"
    elif row.new == row.limit:
        reason = "length"
    row.live = reason is None
    step = Step(row=number, id=row.last, finish_reason=reason, dropped_tokens=row.dropped)
    if settings.logprobs is None:
        return step
    top = likeliest(logits, settings.logprobs)
    chosen, *others = logprobs_of(logits, [row.last, *top])
    return replace(step, logprob=chosen, top=tuple(map(TokenLogprob, top, others)))


def can_speculate(executor: Executor, rows: Sequence[Row]) -> bool:
    """One row only, and an executor whose logits are the same to the bit, however ids are fed."""
    alone = len(rows) == 1 and rows[0].settings.speculation
    return alone and getattr(executor, "batch_invariant", False)


def generate(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | Sequence[GenerationSettings],
    *,
    progress: Progress | None = None,
    held: list[Cache] | None = None,
) -> Generation:
    """Continue every prompt (ids) -> its steps, as an iterator with `cancel`, `close`, `timings`.

    `settings` are for all rows, or one for each. A row's ids depend on its prompt, settings and
    seed, and not on its neighbours (as far as the executor's arithmetic does not). `progress` is
    told the prompt ids read, of all, while the prompts are long. `held` receives the cache once the
    prompts are read, in place of what it held: an executor that shares beginnings between caches
    finds there what the next call begins with. Raises GenerationError at once:
    no prompt, an empty one, one that leaves no room in the context, an id outside the vocabulary.
    """
    if not prompts:
        raise GenerationError("no prompts: expected at least one")
    each = [settings] * len(prompts) if isinstance(settings, GenerationSettings) else [*settings]
    if len(each) != len(prompts):
        raise GenerationError(f"{len(each)} settings for {len(prompts)} prompts: expected as many")
    rows = [_row(n, executor, *both) for n, both in enumerate(zip(prompts, each, strict=True))]
    return Generation(executor, rows, progress, held)


def _row(
    number: int, executor: Executor, prompt: Sequence[int], settings: GenerationSettings
) -> Row:
    config = executor.config
    ids = checked_ids(f"prompt {number}", prompt, config.vocab_size)
    limit, context = _sizes(f"prompt {number}", len(ids), config, settings)
    native = getattr(executor, "native_sampler", None)
    size = min(settings.vocabulary or config.vocab_size, config.vocab_size)
    sampling = settings.sampler.start([id for id in ids if id < size], size, native)
    return Row(
        prompt=ids, settings=settings, sampling=sampling, limit=limit, context=context,
        window=[*ids],
    )  # fmt: skip


def _sizes(
    what: str, length: int, config: LlamaConfig, settings: GenerationSettings
) -> tuple[int, int]:
    """How many ids may follow a prompt of `length` ids, and how many the model may see at once.

    Raises GenerationError: a context that the model does not have, no room for an answer.
    """
    longest, context = config.max_seq_len, settings.context
    if context is None and config.unbounded:
        limit = settings.max_tokens or longest
        return limit, length + limit
    context = longest if context is None else context
    if context > longest:
        raise GenerationError(f"context {quoted(context)} is more than the model's {longest}")
    room = context - length
    if room < 1:
        advice = f"shorten it to at most {context - 1}"
        if length < longest:
            advice += f", or allow a context of up to {longest}"
        raise GenerationError(
            f"{what} has {length} ids and the context holds {context}: no room for an answer; "
            f"{advice}"
        )
    if settings.max_tokens is None:
        return room, context
    shifts = settings.on_overflow == "shift"
    return settings.max_tokens if shifts else min(settings.max_tokens, room), context


def checked_ids(what: str, given: Iterable[object], vocab_size: int) -> list[int]:
    """Ids as whole numbers of Python's. Raises GenerationError that names `what`: none, no id."""
    ids: list[int] = []
    for position, id in enumerate(given):
        try:
            if isinstance(id, bool):
                raise TypeError
            ids.append(operator.index(id))  # type: ignore[arg-type]
        except TypeError:
            raise GenerationError(
                f"{what}: {quoted(id)} at position {position} is no id (a whole number)"
            ) from None
        if not 0 <= ids[-1] < vocab_size:
            raise GenerationError(
                f"{what}: id {quoted(ids[-1])} at position {position} is outside the vocabulary "
                f"0 … {vocab_size - 1}"
            )
    if not ids:
        raise GenerationError(
            f"{what} is empty: expected at least one id to continue, such as the "
            "beginning-of-text id"
        )
    return ids
