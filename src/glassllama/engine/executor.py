"""The engine from outside: packed weights in, ids in, logits out (base.interfaces.Executor)."""

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

from glassllama.base import code_cache
from glassllama.base.config import LlamaConfig
from glassllama.base.errors import GenerationError, quoted
from glassllama.base.interfaces import FOREIGN_CACHE, Cache, CacheType, require_cache_size
from glassllama.base.turn import in_turn
from glassllama.engine import model
from glassllama.engine.attention import SPAN
from glassllama.engine.dispatch import tier
from glassllama.engine.kv_cache import (
    CACHE_KINDS,
    PagedCache,
    Pages,
    bytes_per_token,
)
from glassllama.engine.kv_pages import FLOAT32, PAGE
from glassllama.engine.layer_ops import Step
from glassllama.engine.layout import Matrix
from glassllama.engine.prepare_step import set_out
from glassllama.engine.sampling import Choice, Chooser
from glassllama.engine.thread_pool import LIVING, Crew, processors
from glassllama.engine.workspace import Room

# Tokens of one step, enough to use a weight often while it is in a near cache: the first, unless a
# single layer would take them too long for Ctrl-C.
CHUNKS = (256, 128)
NATIVE_SECONDS = 0.04  # the aim for one native call, so that Ctrl-C is answered within 0.1 s
LAYER_SECONDS = 0.07  # the most for one layer, which cannot be divided
FIRST_GUESS = 4e9  # weight bytes × tokens per second, until it has been measured

IDS = "ids must be between 0 and {last}, got {bad}: the text was encoded for another vocabulary"


@dataclass(frozen=True)
class Weights:
    """A whole model, packed. `matrices` are wq wk wv wo gate up down of every layer, then output.

    `embeddings` is the same object as the last of `matrices` where the two are tied.
    """

    matrices: list[Matrix]
    embeddings: Matrix
    norms: NDArray[np.float32]  # (2·layers + 1, C): attention and ffn of every layer, then the last

    @property
    def nbytes(self) -> int:
        distinct = {id(m): m.nbytes for m in (*self.matrices, self.embeddings)}
        return sum(distinct.values()) + self.norms.nbytes


NOTHING = (0,) * len(Step._fields)  # orders of a step without tokens


class Token(NamedTuple):
    """One id on its way through a step, told as engine/workspace.py's ID, ROW, POSITION."""

    id: int
    row: int
    position: int


class Engine:
    """A Llama on this machine's processors. Several callers at once wait for each other."""

    same_in_pieces = True  # logits are equal to the bit, however a row's ids are cut into calls

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
        """`exact` keeps keys and values in float32, else `cache` says how; the weights' kinds are
        the caller's choice.

        `threads` is how many processors to use, all that this process may use if None.
        """
        self.config = config
        self.weights = weights
        self.exact = exact
        self.cache_kind = FLOAT32 if exact else CACHE_KINDS[cache]
        available = processors()
        self.threads = min(threads or available, available)
        self.notes = list(notes)
        if threads is not None and threads > available:
            self.notes.append(f"{threads} threads asked for, {available} processors: using those")
        self._pages = Pages(PAGE * bytes_per_token(config, self.cache_kind))
        self.turn = self._pages.turn
        self._room = Room(
            config, weights.matrices, weights.embeddings, weights.norms,
            slots=CHUNKS[0], threads=self.threads,
        )  # fmt: skip
        self._layer_seconds = weights.nbytes / config.n_layers / FIRST_GUESS
        self._compile()
        self.assemble()
        self.notes += code_cache.notes

    def new_cache(self, batch: int, max_len: int) -> PagedCache:
        """An empty cache for `batch` rows of at most `max_len` tokens; grows as it is used.

        Rows that begin alike, in this cache or another one that is still there, share memory and
        work. Raises GenerationError if `max_len` is more than the model's context.
        """
        require_cache_size(self.config, batch, max_len)
        return PagedCache(self._pages, batch, max_len, self.cache_kind)

    @in_turn
    def next_logits(self, ids: Sequence[Sequence[int]], cache: Cache) -> NDArray[np.float32]:
        """Feed each row its new ids -> (B, V) float32 logits after each row's last.

        A row's logits are the same to the bit, alone or in a batch. Raises GenerationError where
        an id is not of this vocabulary or the cache has no room. After any exception, Ctrl-C too,
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
            own.go_back(before)
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

    @in_turn
    def all_logits(self, ids: Sequence[int], cache: Cache) -> NDArray[np.float32]:
        """Feed the only row -> (T, V) float32 logits after every one of its new ids.

        Errors as `next_logits`.
        """
        own = self._own(cache)
        if own.batch != 1:
            raise GenerationError(f"all_logits feeds one row, the cache has {own.batch}")
        new, before = self._checked(0, ids, own), [*own.lengths]
        logits = self._new_logits(len(new))
        try:
            self._feed([(0, new)], range(len(new)), own, logits)
        except BaseException:
            own.go_back(before)
            raise
        return logits[:, : self.config.vocab_size]

    def chooser(self, *, vocab_size: int, **settings: float) -> Chooser:
        """For one request: logits (V,) -> an id, in one native call. Settings: sampling.Choice."""
        return Chooser(vocab_size, Choice(**settings))

    def describe(self) -> list[str]:
        """How it runs and what the weights were packed as; then what was noted on the way."""
        kinds: dict[str, int] = {}
        for matrix in {
            id(m): m for m in (*self.weights.matrices, self.weights.embeddings)
        }.values():
            kinds[matrix.kind.name] = kinds.get(matrix.kind.name, 0) + matrix.nbytes
        packed = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sorted(kinds.items()))
        how = f"engine: {self.threads} threads, kernels of tier {tier()}, packed as {packed}"
        return [how, *self.notes]

    def _new_logits(self, count: int) -> NDArray[np.float32]:
        return np.empty((count, self.weights.matrices[-1].padded_rows), np.float32)

    def _in_order(
        self, logits: NDArray[np.float32], fed: list[int], batch: int
    ) -> NDArray[np.float32]:
        """Logits of rows in the order in which they were fed -> (B, V)."""
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
        wanted: Sequence[int],
        cache: PagedCache,
        logits: NDArray[np.float32],
    ) -> None:
        """Feed rows their new ids; tokens whose numbers are `wanted`, in order, fill the rows of
        `logits`."""
        for row, ids in new:
            cache.reserve(row, cache.lengths[row] + len(ids))
        tokens = [
            Token(id, row, cache.lengths[row] + n) for row, ids in new for n, id in enumerate(ids)
        ]
        first = 0
        while first < len(tokens):
            last = first + self.prefill_chunk
            some = [n - first for n in wanted if first <= n < last]
            self._step(tokens[first:last], some, cache, logits)
            logits, first = logits[len(some) :], last
        for row, ids in new:
            cache.remember(row, ids)

    def _own(self, cache: Cache) -> PagedCache:
        if not isinstance(cache, PagedCache) or cache.turn is not self.turn:
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
        wanted: list[int],
        cache: PagedCache,
        logits: NDArray[np.float32],
    ) -> None:
        """One chunk through all layers, in native calls that are short enough for Ctrl-C."""
        tables, count, table = self._room.tables, len(tokens), cache.table
        position = max(token.position for token in tokens)
        spans = position // SPAN + 1
        assert count <= CHUNKS[0]
        assert len(wanted) <= min(count, len(logits))
        assert position < min(cache.max_len, table.shape[1] * PAGE)
        tables["told"][:count] = tokens
        tables["wanted"][: len(wanted)] = wanted
        self._room.make_room_for(spans)
        tiles = set_out(self._room.record, count)
        shared = (table.ctypes.data, table.shape[1], spans, cache.kind, logits.ctypes.data)
        for layers in self._calls(count):
            started = time.perf_counter()
            self._run(count, tiles, len(wanted), *layers, *shared)
            spent = time.perf_counter() - started
            self._layer_seconds = spent / ((layers[1] - layers[0]) * count)

    def _run(self, *orders: int) -> None:
        """One native call, on all threads; `orders` are the fields of model.Step."""
        crew = self._crew
        if not crew.complete:  # in the child of a fork, or interrupted at the start
            self._start_crew()
        model.serve(0, *crew.place, orders, self._room.record)

    def _calls(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of layers, each about as long as a native call may take."""
        first, layers = 0, self.config.n_layers
        while first < layers:
            count = max(1, int(NATIVE_SECONDS / (self._layer_seconds * tokens)))
            yield first, min(first + count, layers)
            first += count

    def _compile(self) -> None:
        """Everything, before there are other threads: one that waits for the compiler while another
        waits for it would wait for ever."""
        set_out(self._room.record, 0)
        model.serve(0, *Crew(1, 0).place, NOTHING, self._room.record)

    def assemble(self) -> None:
        """Threads that are ready to compute, once they are needed."""
        phases = self.config.n_layers * model.PHASES + model.LOGITS_PHASES
        self._crew = Crew(self.threads, phases)
        self._crew.stop_with(self)

    def _start_crew(self) -> None:
        keep = (self._room, self.weights)
        self._crew.start(model.serve, NOTHING, self._room.record, keep=keep)


def assemble_all() -> None:
    """A child has none of its parent's other threads; base/turn.py sees to the locks."""
    for owner, _ in [*LIVING]:
        if isinstance(engine := owner(), Engine):
            engine.assemble()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=assemble_all)
