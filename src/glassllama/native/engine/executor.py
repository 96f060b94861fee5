"""The engine as an executor: packed weights in, ids in, logits out (base.interfaces.Executor)."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import DecoderConfig
from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import (
    CLOSED,
    FOREIGN_CACHE,
    CacheType,
    Capabilities,
    KVCache,
    NewTokens,
    TokenBatch,
    checked_tokens,
    require_distinct,
    row_ids,
)
from glassllama.base.layer_plan import ModelPlan
from glassllama.base.locks import synchronized
from glassllama.native.engine import model
from glassllama.native.engine.attention import SPAN
from glassllama.native.engine.dispatch import tier
from glassllama.native.engine.kv_cache import (
    CACHE_KINDS,
    CachedSequence,
    PagedCache,
    Pages,
    Row,
    shared_prefix,
)
from glassllama.native.engine.layer_ops import Step
from glassllama.native.engine.layout import KV_FLOAT32, PAGE
from glassllama.native.engine.sampling import NativeSampler, SamplerParams
from glassllama.native.engine.thread_pool import LIVE_POOLS, ThreadPool, num_processors
from glassllama.native.engine.workspace import Weights, Workspace
from glassllama.native.jit import code_cache

# Tokens of one step, enough to use a weight often while it is in a near cache. The first is used
# unless one layer would take so long for them that Ctrl-C had to wait.
CHUNKS = (256, 128)
CALL_SECONDS = 0.04  # planned duration of one native call, so that Ctrl-C is answered within 0.1 s
LAYER_SECONDS = 0.07  # most for one layer, which is not divided
FIRST_SPEED = 4e9  # assumed weight bytes × tokens per second, until it has been measured


EMPTY_STEP = (0,) * len(Step._fields)  # arguments of a step without tokens


class Token(NamedTuple):
    """One row of the workspace's table `tokens`."""

    id: int  # -1: it has a row instead
    sequence: int
    position: int
    prefix: int  # of its sequence, if it is in it, else 0


@dataclass
class Part:
    """The new tokens of one sequence, on their way through a forward pass."""

    tokens: NewTokens
    sequence: CachedSequence
    ids: list[int]  # that are still to be computed
    first_row: int  # of the logits

    @property
    def may_reuse(self) -> bool:
        """Whether ids that another sequence has computed may be skipped."""
        return self.tokens.output != "all"

    def described(self) -> Iterator[tuple[Token, Row | None]]:
        """The new tokens, and the rows of those that have no id of the vocabulary."""
        sequence = self.sequence
        for position, id in enumerate(self.ids, start=sequence.length):
            source = sequence.sources.get(id, id)
            prefix = sequence.prefix if position < sequence.prefix else 0
            if isinstance(source, int):
                yield Token(source, sequence.slot, position, prefix), None
            else:
                yield Token(-1, sequence.slot, position, prefix), source

    def will_share(self, other: Part, cache: PagedCache) -> bool:
        """Whether it can go on from tokens that the other one computes first."""
        both = (self.sequence, self.ids, other.sequence, other.ids)
        return self.may_reuse and cache.will_share(*both)

    def skip_known(self, cache: PagedCache) -> None:
        """Take over what the cache knows of the ids; the last one's logits must be computed."""
        if self.may_reuse:
            most = len(self.ids) - (self.tokens.output == "last")
            del self.ids[: cache.match_prefix(self.sequence, self.ids[:most])]


def new_lengths(
    parts: Sequence[Part], first: int, last: int
) -> Iterator[tuple[CachedSequence, int, int]]:
    """Of the sequences with new tokens `first` … last-1, all parts counted through -> lengths.

    Each is a sequence, and its length before and after these tokens.
    """
    start = 0
    for part in parts:
        low, high = max(start, first), min(start + len(part.ids), last)
        if low < high:
            past = part.sequence.length - start
            yield part.sequence, past + low, past + high
        start += len(part.ids)


def make_native_sampler(*, vocab_size: int, **settings: float) -> NativeSampler:
    """A sampler for one request: logits (V,) -> an id, in one native call.

    Settings are the fields of sampling.SamplerParams.
    """
    return NativeSampler(vocab_size, SamplerParams(**settings))


class Engine:
    """A decoder on the CPU. Calls of several threads wait for each other."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        *,
        plan: ModelPlan,
        exact: bool = False,
        cache: CacheType = "int16",
        threads: int | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """`exact` stores keys and values in float32, else `cache` says how.

        `threads` is how many processors to use; None: all that this process may use.
        """
        self.config = config
        self.plan = plan
        self.weights = weights
        self.exact = exact
        self.cache_kind = KV_FLOAT32 if exact else CACHE_KINDS[cache]
        available = num_processors()
        self.threads = min(threads or available, available)
        self.notes = list(notes)
        if threads is not None and threads > available:
            self.notes.append(f"{threads} threads asked for, {available} processors: using those")
        self._pages = Pages(plan, self.cache_kind)
        self.lock = self._pages.lock
        self._workspace = Workspace(plan, weights, max_tokens=CHUNKS[0], threads=self.threads)
        self._closed = False
        self._layer_seconds = weights.nbytes / config.n_layers / FIRST_SPEED
        self._compile()
        self.create_pool()
        self.notes += code_cache.notes

    @property
    def capabilities(self) -> Capabilities:
        chunk = CHUNKS[0 if self._layer_seconds * CHUNKS[0] <= LAYER_SECONDS else 1]
        return Capabilities(
            prefill_chunk=chunk,
            batch_invariant=True,
            shares_prefixes=True,
            takes_rows=True,
            native_sampler=make_native_sampler,
        )

    def new_cache(self) -> PagedCache:
        """An empty cache; it grows as it is used.

        Sequences with a common beginning, in this cache or another one of this engine, share memory
        and work.
        """
        return PagedCache(self._pages, self.cache_kind)

    @synchronized
    def forward(self, batch: TokenBatch, cache: KVCache) -> NDArray[np.float32]:
        """Append new tokens to sequences -> (rows, V) float32 logits, in the order of the batch.

        The logits of a sequence are bit-identical, alone or in a batch, and however its ids are cut
        into calls. Errors as in base.interfaces.Executor.
        """
        if self._closed:
            raise GenerationError(CLOSED)
        if not isinstance(cache, PagedCache) or cache.lock is not self.lock:
            raise GenerationError(FOREIGN_CACHE)
        require_distinct(batch)
        new, rows = list[Part](), 0
        for tokens in batch:
            new.append(self._checked(tokens, cache, rows))
            rows += tokens.num_outputs
        logits = self._new_logits(rows)
        before = [part.sequence.length for part in new]
        try:
            for part in new:
                if not cache.can_continue(part.sequence):
                    self._compute_again(part.sequence, cache)
                part.sequence.continued_from = [part.sequence.length]
            self._forward(new, cache, logits)
            for part, length in zip(new, before, strict=True):
                part.sequence.continued_from = []
                cache.free_unseen(part.sequence, length, part.sequence.length)
        except BaseException:
            for part, length in zip(new, before, strict=True):
                cache.set_length(part.sequence, length)
            raise
        return logits[:, : self.config.vocab_size]

    def _compute_again(self, sequence: CachedSequence, cache: PagedCache) -> None:
        """Replace the pages of a sequence, without a window's memory, by those of a new one."""
        number, other = cache.new_sequence()
        other.prefix, other.sources = sequence.prefix, sequence.sources
        ids, prefix = sequence.ids(), sequence.prefix
        try:
            for is_prefix, some in ((True, ids[:prefix]), (False, ids[prefix:])):
                if some:
                    same = NewTokens(number, [], "none", prefix=is_prefix)
                    part = Part(same, other, some, first_row=0)
                    self._forward([part], cache, self._new_logits(0))
            cache.take_pages(sequence, other)
        finally:
            cache.drop(number)

    def _forward(self, waiting: list[Part], cache: PagedCache, logits: NDArray[np.float32]) -> None:
        """Compute the new tokens of all parts; where two begin alike, the second waits."""
        if all(len(part.ids) == 1 for part in waiting):
            self._feed(waiting, cache, logits)
            return
        for part in waiting:
            part.skip_known(cache)
        while waiting:
            now, later = list[Part](), list[Part]()
            for part in waiting:
                first = next((other for other in now if part.will_share(other, cache)), None)
                (later if first else now).append(part)
                if first:
                    shared = first.sequence.length + shared_prefix(part.ids, first.ids)
                    first.sequence.continued_from.append(shared)
            prefixes = [part for part in now if part.ids and part.tokens.prefix]
            others = [part for part in now if part.ids and not part.tokens.prefix]
            for parts in (*([part] for part in prefixes), others):
                self._feed(parts, cache, logits)
            for part in later:
                part.skip_known(cache)
            waiting = later

    def close(self) -> None:
        """Stop the threads. A further step raises GenerationError."""
        self._pool.stop()
        self._closed = True

    def describe(self) -> list[str]:
        """How the engine runs and which formats the weights were packed as, then the notes."""
        sizes: dict[str, int] = {}
        for matrix in {
            id(m): m for m in (*self.weights.matrices, self.weights.embeddings)
        }.values():
            sizes[matrix.weight_type.name] = sizes.get(matrix.weight_type.name, 0) + matrix.nbytes
        packed = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sorted(sizes.items()))
        how = f"engine: {self.threads} threads, kernels of tier {tier()}, packed as {packed}"
        return [how, *self.notes]

    def _new_logits(self, count: int) -> NDArray[np.float32]:
        return np.empty((count, self.weights.matrices[-1].padded_rows), np.float32)

    def _feed(self, parts: list[Part], cache: PagedCache, logits: NDArray[np.float32]) -> None:
        """Compute the ids of all parts in chunks, and fill their rows of `logits`.

        A prefix is the only part.
        """
        tokens, rows = list[Token](), list[Row | None]()
        outputs = list[tuple[int, int]]()  # token, row of logits
        for part in parts:
            sequence, last = part.sequence, len(tokens) + len(part.ids) - 1
            cache.reserve(sequence, sequence.length + len(part.ids))
            if part.tokens.output == "last":
                outputs.append((last, part.first_row))
            elif part.tokens.output == "all":
                of_part = range(part.first_row, part.first_row + len(part.ids))
                outputs += zip(range(len(tokens), last + 1), of_part, strict=True)
            for token, row in part.described():
                tokens.append(token)
                rows.append(row)
        in_order = [row for _, row in outputs] == list(range(len(logits)))
        out = logits if in_order else self._new_logits(len(outputs))
        feed = self._feed_prefix if parts and parts[0].tokens.prefix else self._feed_chunks
        feed(parts, tokens, rows, [token for token, _ in outputs], cache, out)
        if not in_order:
            logits[[row for _, row in outputs]] = out
        for part in parts:
            cache.commit(part.sequence, part.ids)

    def _feed_chunks(
        self, parts: list[Part], tokens: list[Token], rows: list[Row | None], outputs: list[int],
        cache: PagedCache, logits: NDArray[np.float32],
    ) -> None:  # fmt: skip
        """One chunk after the other through all layers; `outputs` are tokens with logits."""
        first = done = 0
        while first < len(tokens):
            last = first + self.capabilities.prefill_chunk
            some = [token - first for token in outputs if first <= token < last]
            new = [*new_lengths(parts, first, last)] if self._pages.window else []
            for lengths in new:
                cache.open_window(*lengths)
            self._step(tokens[first:last], rows[first:last], some, cache, logits[done:])
            for lengths in new:
                cache.free_unseen(*lengths)
            first, done = last, done + len(some)

    def _feed_prefix(
        self, parts: list[Part], tokens: list[Token], rows: list[Row | None], outputs: list[int],
        cache: PagedCache, logits: NDArray[np.float32],
    ) -> None:  # fmt: skip
        """All chunks of a prefix through one layer, then through the next.

        Each token sees the keys of all, so a first pass through a layer only stores keys and
        values.
        """
        count, x = len(tokens), np.empty((len(tokens), self.plan.dim), np.float32)
        chunks = -(-count // CHUNKS[0])
        bounds = [count * n // chunks for n in range(chunks + 1)]
        for lengths in new_lengths(parts, 0, count) if self._pages.window else ():
            cache.open_window(*lengths)
        if chunks == 1:
            self._step(tokens, rows, outputs, cache, logits)
            return
        for layer, keys_only in itertools.product(range(self.plan.n_layers), (1, 0)):
            done = 0
            for first, last in itertools.pairwise(bounds):
                some = [token - first for token in outputs if first <= token < last]
                tiles, *locations = self._load(tokens[first:last], rows[first:last], some, cache)
                now = self._workspace.tables["x"][: last - first]
                if layer > 0:
                    now[:] = x[first:last]
                out, layers = logits[done:].ctypes.data, (layer, layer + 1)
                count = 0 if keys_only else len(some)
                self._run(last - first, tiles, count, *layers, *locations, out, keys_only)
                x[first:last] = now
                done += len(some)

    def _checked(self, tokens: NewTokens, cache: PagedCache, first_row: int) -> Part:
        """A part of the batch, with ids that can be fed to its sequence. Raises GenerationError."""
        sequence = cache.get(tokens.sequence)
        ids, rows = checked_tokens(tokens, sequence.length, self.config, self.plan.dim)
        sources: dict[int, int | Row] = {**rows}
        if tokens.prefix:  # keys and values follow from all of it, so they are shared as a whole
            sequence.prefix = len(ids)
            own = row_ids(repr(ids).encode(), len(ids))
            sources = {key: rows.get(id, id) for key, id in zip(own, ids, strict=True)}
            ids = own
        sequence.sources |= sources
        return Part(tokens, sequence, ids, first_row)

    def _load(
        self, tokens: list[Token], rows: list[Row | None], outputs: list[int], cache: PagedCache
    ) -> tuple[int, ...]:
        """Fill the buffers that a step reads -> its tiles, and where its cache is (`Step`)."""
        tables, count, page_table = self._workspace.tables, len(tokens), cache.table
        end = max(max(token.position + 1, token.prefix) for token in tokens)
        assert count <= CHUNKS[0]
        assert end <= page_table.shape[2] * PAGE
        tables["tokens"][:count] = tokens
        tables["output_rows"][: len(outputs)] = outputs
        for n, row in enumerate(rows):
            if row is not None:
                tables["x"][n] = row
        spans = (end - 1) // SPAN + 1
        self._workspace.reserve_partials(spans)
        tiles = model.prepare_step(self._workspace.record, count)
        return tiles, page_table.ctypes.data, page_table.shape[2], spans, cache.kv_type

    def _step(
        self,
        tokens: list[Token],
        rows: list[Row | None],
        outputs: list[int],
        cache: PagedCache,
        logits: NDArray[np.float32],
    ) -> None:
        """One chunk through all layers, in native calls that are short enough for Ctrl-C."""
        count = len(tokens)
        assert len(outputs) <= min(count, len(logits))
        tiles, *locations = self._load(tokens, rows, outputs, cache)
        for layers in self._calls(count):
            started = time.perf_counter()
            self._run(count, tiles, len(outputs), *layers, *locations, logits.ctypes.data, 0)
            spent = time.perf_counter() - started
            self._layer_seconds = spent / ((layers[1] - layers[0]) * count)

    def _run(self, *step_args: int) -> None:
        """One native call, on all threads; `step_args` are the fields of layer_ops.Step."""
        pool = self._pool
        if not pool.is_started:  # in the child of a fork, or interrupted at the start
            self._start_pool()
        model.worker_loop(0, *pool.native_args, step_args, self._workspace.record)

    def _calls(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of layers, each of about the planned duration of a native call."""
        first, layers = 0, self.config.n_layers
        while first < layers:
            count = max(1, int(CALL_SECONDS / (self._layer_seconds * tokens)))
            yield first, min(first + count, layers)
            first += count

    def _compile(self) -> None:
        """Compile everything before other threads exist.

        A thread that waited for the compiler while another thread waited for it would never end.
        """
        model.prepare_step(self._workspace.record, 0)
        model.worker_loop(0, *ThreadPool(1, 0).native_args, EMPTY_STEP, self._workspace.record)

    def create_pool(self) -> None:
        """A new thread pool; its threads start with the first step."""
        phases = self.config.n_layers * model.PHASES + model.LOGITS_PHASES
        self._pool = ThreadPool(self.threads, phases)
        self._pool.stop_with(self)

    def _start_pool(self) -> None:
        keep = (self._workspace, self.weights)
        self._pool.start(model.worker_loop, EMPTY_STEP, self._workspace.record, keep=keep)


def create_pools_after_fork() -> None:
    """The child of a fork has none of its parent's other threads. (Locks: base/locks.py.)"""
    for owner, _ in [*LIVE_POOLS]:
        if isinstance(engine := owner(), Engine):
            engine.create_pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=create_pools_after_fork)
