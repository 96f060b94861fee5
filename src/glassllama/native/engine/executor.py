"""The engine as an executor: packed weights in, ids in, logits out (base.interfaces.Executor)."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import GenerationError, quoted
from glassllama.base.interfaces import FOREIGN_CACHE, Cache, CacheType, require_cache_size
from glassllama.base.locks import synchronized
from glassllama.native.engine import model
from glassllama.native.engine.attention import SPAN
from glassllama.native.engine.dispatch import tier
from glassllama.native.engine.kv_cache import (
    CACHE_KINDS,
    PagedCache,
    Pages,
    bytes_per_token,
)
from glassllama.native.engine.kv_pages import FLOAT32, PAGE
from glassllama.native.engine.layer_ops import Step
from glassllama.native.engine.layout import Matrix
from glassllama.native.engine.prepare_step import prepare_step
from glassllama.native.engine.sampling import NativeSampler, SamplerParams
from glassllama.native.engine.thread_pool import LIVE_POOLS, ThreadPool, num_processors
from glassllama.native.engine.workspace import Workspace
from glassllama.native.jit import code_cache

# Tokens of one step, enough to use a weight often while it is in a near cache. The first is used
# unless one layer would take so long for them that Ctrl-C had to wait.
CHUNKS = (256, 128)
CALL_SECONDS = 0.04  # planned duration of one native call, so that Ctrl-C is answered within 0.1 s
LAYER_SECONDS = 0.07  # most for one layer, which is not divided
FIRST_SPEED = 4e9  # assumed weight bytes × tokens per second, until it has been measured

IDS = "ids must be between 0 and {last}, got {bad}: the text was encoded for another vocabulary"


@dataclass(frozen=True)
class Weights:
    """A whole model, packed. `matrices` are wq wk wv wo gate up down of every layer, then output.

    `embeddings` is the same object as the last of `matrices` if the two are tied.
    """

    matrices: list[Matrix]
    embeddings: Matrix
    norms: NDArray[np.float32]  # (2·layers + 1, C): attention and ffn of every layer, then the last

    @property
    def nbytes(self) -> int:
        distinct = {id(m): m.nbytes for m in (*self.matrices, self.embeddings)}
        return sum(distinct.values()) + self.norms.nbytes


EMPTY_STEP = (0,) * len(Step._fields)  # arguments of a step without tokens


class Token(NamedTuple):
    """One row of the workspace's table `tokens`."""

    id: int
    sequence: int
    position: int


class Engine:
    """A Llama on the CPU. Calls of several threads wait for each other."""

    batch_invariant = True  # logits are bit-identical, however the ids of a row are cut into calls

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        *,
        exact: bool = False,
        cache: CacheType = "int16",
        threads: int | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """`exact` stores keys and values in float32, else `cache` says how.

        `threads` is how many processors to use; None: all that this process may use.
        """
        self.config = config
        self.weights = weights
        self.exact = exact
        self.cache_kind = FLOAT32 if exact else CACHE_KINDS[cache]
        available = num_processors()
        self.threads = min(threads or available, available)
        self.notes = list(notes)
        if threads is not None and threads > available:
            self.notes.append(f"{threads} threads asked for, {available} processors: using those")
        self._pages = Pages(PAGE * bytes_per_token(config, self.cache_kind))
        self.lock = self._pages.lock
        self._workspace = Workspace(
            config, weights.matrices, weights.embeddings, weights.norms,
            max_tokens=CHUNKS[0], threads=self.threads,
        )  # fmt: skip
        self._layer_seconds = weights.nbytes / config.n_layers / FIRST_SPEED
        self._compile()
        self.create_pool()
        self.notes += code_cache.notes

    def new_cache(self, batch: int, max_len: int) -> PagedCache:
        """An empty cache for `batch` rows of at most `max_len` tokens; it grows as it is used.

        Rows with a common beginning, in this cache or another one of this engine, share memory and
        work. Raises GenerationError if `max_len` is more than the model's context.
        """
        require_cache_size(self.config, batch, max_len)
        return PagedCache(self._pages, batch, max_len, self.cache_kind)

    @synchronized
    def next_logits(self, ids: Sequence[Sequence[int]], cache: Cache) -> NDArray[np.float32]:
        """Feed each row its new ids -> (B, V) float32 logits after each row's last id.

        The logits of a row are bit-identical, alone or in a batch. Raises GenerationError if an id
        is not of this vocabulary or the cache is full. After any exception, also KeyboardInterrupt,
        the cache is as before.
        """
        own = self._own(cache)
        if len(ids) != own.batch:
            raise GenerationError(f"{len(ids)} rows of ids for a cache of {own.batch} rows")
        rest = [self._checked(row, new, own) for row, new in enumerate(ids)]
        before = [*own.lengths]
        try:
            return self._next_logits(rest, own)
        except BaseException:
            own.roll_back(before)
            raise

    def _next_logits(self, rest: list[list[int]], cache: PagedCache) -> NDArray[np.float32]:
        waiting = [row for row, new in enumerate(rest) if new]
        logits, fed = self._new_logits(len(waiting)), list[int]()
        while waiting:
            now, waiting = cache.next_to_feed(rest, waiting)
            ends = [end - 1 for end in accumulate(len(rest[row]) for row in now)]
            self._feed([(row, rest[row]) for row in now], ends, cache, logits[len(fed) :])
            fed += now
        return self._in_order(logits, fed, cache.batch)

    @synchronized
    def all_logits(self, ids: Sequence[int], cache: Cache) -> NDArray[np.float32]:
        """Feed the only row -> (T, V) float32 logits after every one of its new ids.

        Errors as in `next_logits`.
        """
        own = self._own(cache)
        if own.batch != 1:
            raise GenerationError(f"all_logits feeds one row, the cache has {own.batch}")
        new, before = self._checked(0, ids, own), [*own.lengths]
        logits = self._new_logits(len(new))
        try:
            self._feed([(0, new)], range(len(new)), own, logits)
        except BaseException:
            own.roll_back(before)
            raise
        return logits[:, : self.config.vocab_size]

    def native_sampler(self, *, vocab_size: int, **settings: float) -> NativeSampler:
        """A sampler for one request: logits (V,) -> an id, in one native call.

        Settings are the fields of sampling.Choice.
        """
        return NativeSampler(vocab_size, SamplerParams(**settings))

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

    def _in_order(
        self, logits: NDArray[np.float32], fed: list[int], batch: int
    ) -> NDArray[np.float32]:
        """Logits of rows, in the order in which these were fed -> (B, V)."""
        if fed != list(range(batch)):
            every = np.empty((batch, logits.shape[1]), np.float32)
            every[fed] = logits
            logits = every
        return logits[:, : self.config.vocab_size]

    @property
    def prefill_chunk(self) -> int:
        """How many tokens of a prompt are best fed at a time."""
        return CHUNKS[0 if self._layer_seconds * CHUNKS[0] <= LAYER_SECONDS else 1]

    def _feed(
        self,
        new: list[tuple[int, list[int]]],
        output_rows: Sequence[int],
        cache: PagedCache,
        logits: NDArray[np.float32],
    ) -> None:
        """Feed rows their new ids. Logits of the tokens `output_rows`, in order, fill `logits`."""
        for row, ids in new:
            cache.reserve(row, cache.lengths[row] + len(ids))
        tokens = [
            Token(id, row, cache.lengths[row] + n) for row, ids in new for n, id in enumerate(ids)
        ]
        first = 0
        while first < len(tokens):
            last = first + self.prefill_chunk
            some = [n - first for n in output_rows if first <= n < last]
            self._step(tokens[first:last], some, cache, logits)
            logits, first = logits[len(some) :], last
        for row, ids in new:
            cache.commit(row, ids)

    def _own(self, cache: Cache) -> PagedCache:
        if not isinstance(cache, PagedCache) or cache.lock is not self.lock:
            raise GenerationError(FOREIGN_CACHE)
        return cache

    def _checked(self, row: int, new: Sequence[int], cache: PagedCache) -> list[int]:
        """Ids as whole numbers. Raises GenerationError if they cannot be fed to this row."""
        last = self.config.vocab_size - 1
        cache.require_room(row, len(new))
        try:
            ids = [operator.index(id) for id in new]
        except TypeError as error:
            raise GenerationError(f"ids must be whole numbers: {error}") from None
        bad = [id for id in ids if not 0 <= id <= last]
        if bad:
            raise GenerationError(IDS.format(last=last, bad=quoted(bad[0])))
        return ids

    def _step(
        self,
        tokens: list[Token],
        output_rows: list[int],
        cache: PagedCache,
        logits: NDArray[np.float32],
    ) -> None:
        """One chunk through all layers, in native calls that are short enough for Ctrl-C."""
        tables, count, page_table = self._workspace.tables, len(tokens), cache.table
        position = max(token.position for token in tokens)
        spans = position // SPAN + 1
        assert count <= CHUNKS[0]
        assert len(output_rows) <= min(count, len(logits))
        assert position < min(cache.max_len, page_table.shape[1] * PAGE)
        tables["tokens"][:count] = tokens
        tables["output_rows"][: len(output_rows)] = output_rows
        self._workspace.reserve_partials(spans)
        tiles = prepare_step(self._workspace.record, count)
        places = (page_table.ctypes.data, page_table.shape[1], spans, cache.kind)
        for layers in self._calls(count):
            started = time.perf_counter()
            self._run(count, tiles, len(output_rows), *layers, *places, logits.ctypes.data)
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
        prepare_step(self._workspace.record, 0)
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
