"""A request: a prompt, how it is continued, what the model sees of it, and what came of it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import GenerationError, quoted
from glassllama.base.interfaces import Executor, ModelConfig, checked_ids
from glassllama.generation.sampler import (
    GREEDY,
    Logits,
    Sampler,
    SamplerState,
    likeliest,
    logprobs_of,
    masked,
    require_whole,
    trouble,
)
from glassllama.generation.speculation import Speculation

FinishReason = Literal["stop", "length"]
Overflow = Literal["stop", "shift"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How a prompt is continued.

    `max_tokens` None means to the end of the context; `context` is the most ids that prompt and
    answer may have together, None the model's own limit. Where `max_tokens` are more than fit,
    `on_overflow` decides: "stop" ends the answer at the end of the context, "shift" drops the older
    half of the text after `bos` and goes on from the rest (see `Request.shift`). `logprobs` is the
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
    speculation: bool = True  # several ids in a step where that is faster; the ids are the same

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


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new id of a request. The last event of a request has the reason why it ended.

    "stop": `id` is a stop id, and no part of the answer's text; "length": `max_tokens` or the
    context is used up. With an `error` the request has ended, and `id` has no meaning.
    """

    request: int  # its number
    row: int  # of a request that is one of several: which
    id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    dropped_tokens: int = 0  # of this request so far: ids that left a full context
    error: GenerationError | None = None


@dataclass
class Timings:
    """Seconds and ids so far, of one request or of several that were made together.

    The first id of each request comes out of the prefill.
    """

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
        """New ids per second, all requests together."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else None


@dataclass(eq=False)
class Request:
    """A prompt being continued; `Request.new` checks it.

    `events` receives its events; without it `Scheduler.step` returns them. While events wait there,
    the request waits too: nothing is computed ahead of what is asked for. `owner` is a weak
    reference: if that object is gone, the answer is not needed any more.
    """

    prompt: list[int]  # negative ids stand for `rows`
    settings: GenerationSettings
    sampling: SamplerState
    limit: int  # ids it may still be given at most, prompt not counted
    context: int  # the most ids that `window` may have
    window: list[int]  # what the model sees: prompt and answer, but for what was dropped
    name: str = "the prompt"  # in messages
    rows: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)  # as in NewTokens
    prefix: bool = False  # whether all ids of the prompt see each other
    number: int = -1  # the scheduler gives it
    row: int = 0
    events: deque[TokenEvent] | None = None
    owner: weakref.ref[object] | None = None
    keep: bool = False  # keep its keys and values for a request that begins alike
    timings: Timings = field(default_factory=Timings)
    speculation: Speculation | None = None
    sequence: int = -1  # in the scheduler's cache
    num_read: int = 0  # ids of `window` that the model has read
    dropped: int = 0
    num_new: int = 0
    live: bool = True
    cancelled: bool = False
    choosing: bool = False  # an exception came while its next id was chosen, if it stays True

    @classmethod
    def new(
        cls,
        executor: Executor,
        prompt: Sequence[int],
        settings: GenerationSettings,
        name: str = "the prompt",
        rows: Mapping[int, NDArray[np.float32]] | None = None,
        prefix: bool = False,
    ) -> Request:
        """A request that `executor` can run; `rows` and `prefix` as in `NewTokens`.

        Raises GenerationError: an empty prompt, one that leaves no room in the context, an id
        outside the vocabulary.
        """
        config = executor.config
        rows = rows or {}
        ids = checked_ids(name, prompt, config.vocab_size, rows.keys())
        if prefix and settings.on_overflow == "shift":
            raise GenerationError("on_overflow: a prompt that begins with a picture cannot shift")
        limit, context = sizes(name, len(ids), config, settings)
        size = min(settings.vocabulary or config.vocab_size, config.vocab_size)
        native = executor.capabilities.native_sampler
        sampling = settings.sampler.start([id for id in ids if 0 <= id < size], size, native)
        return cls(
            prompt=ids, settings=settings, sampling=sampling, limit=limit, context=context,
            window=[*ids], name=name, rows=rows, prefix=prefix,
            timings=Timings(prompt_tokens=len(ids)),
        )  # fmt: skip

    @property
    def is_waiting(self) -> bool:
        """Whether its last events have not been taken yet."""
        return bool(self.events)

    @property
    def is_abandoned(self) -> bool:
        return self.owner is not None and self.owner() is None

    @property
    def num_left(self) -> int:
        """How many ids may still follow before it ends or its window is full."""
        return min(self.limit - self.num_new, self.context - len(self.window))

    def shift(self) -> None:
        """Drop the older half of the ids after the begin-of-text id, and at least one."""
        start = 1 if self.window[0] == self.settings.bos and len(self.window) > 2 else 0
        count = max(1, (len(self.window) - start) // 2)
        del self.window[start : start + count]
        self.dropped += count

    def choose(self, logits: Logits) -> TokenEvent:
        """The next id for logits (V,), as an event. Raises GenerationError for no numbers."""
        settings, sampling = self.settings, self.sampling
        logits = masked(logits[: settings.vocabulary], settings.gaps)
        try:
            id = sampling.choose(logits)
        except GenerationError:
            position = len(self.prompt) + self.num_new - 1
            raise GenerationError(
                f"{self.name}: the logits after position {position} hold {trouble(logits)}; the "
                "weights are damaged or overflow in this precision (validate the file, or load it "
                "with exact=True)"
            ) from None
        self.num_new += 1
        self.window.append(id)
        reason: FinishReason | None = None
        if id in settings.stop_ids and not settings.ignore_eos:
            reason = "stop"
        elif self.num_new == self.limit:
            reason = "length"
        self.live = reason is None
        logprob: float | None = None
        top: tuple[TokenLogprob, ...] = ()
        if settings.logprobs is not None:
            likely = likeliest(logits, settings.logprobs)
            logprob, *others = logprobs_of(logits, [id, *likely])
            top = tuple(map(TokenLogprob, likely, others))
        return TokenEvent(self.number, self.row, id, logprob, top, reason, self.dropped)


def sizes(
    name: str, length: int, config: ModelConfig, settings: GenerationSettings
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
    free = context - length
    if free < 1:
        advice = f"shorten it to at most {context - 1}"
        if length < longest:
            advice += f", or allow a context of up to {longest}"
        raise GenerationError(
            f"{name} has {length} ids and the context holds {context}: no room for an answer; "
            f"{advice}"
        )
    if settings.max_tokens is None:
        return free, context
    shifts = settings.on_overflow == "shift"
    return settings.max_tokens if shifts else min(settings.max_tokens, free), context
