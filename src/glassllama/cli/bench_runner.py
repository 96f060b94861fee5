"""What `glassllama bench` measures: tokens per second of us and of others, in turns.

Every cell of the grid is one question: so many tokens read at once (prefill), or made one after
another (decode), after so much context, in so many rows. All contestants answer it once per run,
one after the other, so that a machine that slows down slows them all; medians count.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, Protocol

from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import NewTokens
from glassllama.base.machine import usable_cores
from glassllama.cli.machine_facts import machine, versions
from glassllama.cli.memory import peak_memory
from glassllama.cli.model_info import stored_as
from glassllama.cli.options import How

if TYPE_CHECKING:
    from glassllama.base.interfaces import Progress
    from glassllama.llm import LLM

LARGEST_STRETCH = 1 << 30  # bytes read to see how fast memory is: beyond it only memory counts
CONTEXT_SEED = 1 << 20  # of the ids before a decode; those of a prompt are the number of its run
Numbers = Literal["int8", "bfloat16", "float32"]
FIRST = 1  # the id that the first row's decoding begins with; the second's with the next one …


class Contestant(Protocol):
    """A program with the model loaded, which does what it is told at once."""

    @property
    def name(self) -> str: ...  # with its version

    @property
    def built_with(self) -> str: ...  # of what the processor has

    @property
    def load_s(self) -> float: ...

    def begin(self, batch: int, room: int) -> None:
        """Forget everything; make room for `batch` rows of so many tokens."""
        ...

    def feed(self, ids: list[int]) -> None:
        """The only row reads these ids, up to the logits after the last."""
        ...

    def rewind(self, length: int) -> None:
        """Forget what came after `length` tokens, in every row."""
        ...

    def decode(self, new: int) -> None:
        """Every row reads an id, FIRST on, then the likeliest each time: `new` steps."""
        ...


class Ours:
    """This package, with the executor that `llm` has; no sampler and no speculation.

    The engine finds again what another row or cache has read before, so no two may begin alike.
    """

    def __init__(self, llm: LLM) -> None:
        self.name, self.built_with, self.load_s = "glassllama", "", llm.load_seconds
        self._executor = llm.executor
        self._cache: Any = None
        self._sequences: list[int] = []

    def begin(self, batch: int, room: int) -> None:
        self._cache = None  # its memory first
        self._cache = self._executor.new_cache()
        self._sequences = [self._cache.add() for _ in range(batch)]

    def feed(self, ids: list[int]) -> None:
        self._executor.forward([NewTokens(self._sequences[0], ids)], self._cache)

    def rewind(self, length: int) -> None:
        for sequence in self._sequences:
            self._cache.rewind(sequence, length)

    def decode(self, new: int) -> None:
        ids = [FIRST + row for row in range(len(self._sequences))]
        for _ in range(new):
            pairs = zip(self._sequences, ids, strict=True)
            batch = [NewTokens(sequence, [id]) for sequence, id in pairs]
            ids = self._executor.forward(batch, self._cache).argmax(-1).tolist()  # (B, V) -> (B,)


@dataclass(frozen=True)
class Cell:
    """One question: `tokens` read at once, or made one by one in each of `batch` rows."""

    what: Literal["prefill", "decode"]
    tokens: int
    context: int = 0  # tokens already there
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which cells. Every prompt, then every context with one row, then every further batch."""

    prompts: Sequence[int]
    contexts: Sequence[int]
    batches: Sequence[int]
    new: int  # tokens of a decode
    runs: int

    def cells(self, room: int) -> list[Cell]:
        """Those that fit a model that holds `room` tokens. Raises GenerationError: none does."""
        wanted = [
            *(Cell("prefill", n) for n in self.prompts),
            *(Cell("decode", self.new, context) for context in self.contexts),
            *(Cell("decode", self.new, 0, batch) for batch in self.batches if batch > 1),
        ]
        fit = [cell for cell in wanted if cell.tokens + cell.context <= room]
        if not fit:
            raise GenerationError(
                f"this model holds {room} tokens: give a smaller --prompt and --new"
            )
        return fit


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell's medians: tokens per second, all rows together; `peers` in the order of Measured."""

    what: str
    tokens: int
    context: int
    batch: int
    tok_s: float
    peers: list[float]
    bytes_s: float | None  # of weights and cache, read by us; decode only
    ops_s: float  # products and sums of matrices, done by us

    @property
    def ratio(self) -> float | None:
        """Ours to the best of theirs."""
        return self.tok_s / max(self.peers) if self.peers else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians over the runs. Rates in tokens per second, times in seconds, sizes in bytes."""

    model: str
    stored_as: dict[str, int]  # bytes of the file by type
    backend: str
    exact: bool
    tier: str | None  # the kernels in use; engine only
    threads: int
    runs: int
    machine: dict[str, Any]
    versions: dict[str, str]
    load_s: float  # with the imports that it takes
    first_token_s: float  # the first one ever: with compiling, if there is any
    bytes_per_token: int  # weights that every new token needs
    ops_per_token: int  # two for every number of them
    bandwidth: float | None  # bytes per second that memory gives; CPU only
    bound_tok_s: float | None  # bandwidth / bytes_per_token: one row cannot decode faster
    peaks: dict[str, float]  # operations per second, by dot product; CPU only
    peak: str | None  # the one of them that this model's numbers are for
    peak_memory: int | None
    peers: list[dict[str, Any]]  # name, built_with, load_s, first_token_s
    rows: list[Row]


def measure(
    llm: LLM, how: How, grid: Grid, peers: Sequence[Contestant], progress: Progress | None
) -> Measured:
    """All cells that fit the model. Raises GenerationError: none does."""
    cells = grid.cells(llm.executor.config.max_seq_len)
    around, ours = machine(), Ours(llm)  # how busy it is, before we are
    needs, threads, on_cpu = Needs.of(llm), threads_of(how), how.device == "cpu"
    before = bandwidth(needs.bytes, threads) if on_cpu else None
    firsts = [first_token(each) for each in (ours, *peers)]
    rows = list(measure_cells(cells, [ours, *peers], grid.runs, needs, progress))
    peak = peak_memory()  # ours and that of the peers
    if before is not None:  # memory that other machines share is faster at times
        before = max(before, bandwidth(needs.bytes, threads))
    peaks = measure_peaks(threads) if on_cpu else {}
    return Measured(
        model=llm.name,
        stored_as={kind["type"]: kind["bytes"] for kind in stored_as(llm.checkpoint)},
        backend=llm.backend,
        exact=how.exact,
        tier=tier_in_use() if llm.backend == "engine" else None,
        threads=threads,
        runs=grid.runs,
        machine=around,
        versions=versions(),
        load_s=llm.load_seconds,
        first_token_s=firsts[0],
        bytes_per_token=needs.bytes,
        ops_per_token=needs.ops,
        bandwidth=before,
        bound_tok_s=None if before is None else before / needs.bytes,
        peaks=peaks,
        peak=next((name for name in peaks if name.startswith(needs.numbers)), None),
        peak_memory=peak,
        peers=[peer_facts(*both) for both in zip(peers, firsts[1:], strict=True)],
        rows=rows,
    )


def peer_facts(peer: Contestant, first_token_s: float) -> dict[str, Any]:
    return {
        "name": peer.name,
        "built_with": peer.built_with,
        "load_s": peer.load_s,
        "first_token_s": first_token_s,
    }


def first_token(contestant: Contestant) -> float:
    contestant.begin(1, 2)
    started = time.perf_counter()
    contestant.decode(1)
    return time.perf_counter() - started


def measure_cells(
    cells: list[Cell],
    contestants: Sequence[Contestant],
    runs: int,
    needs: Needs,
    progress: Progress | None,
) -> Iterator[Row]:
    for done, cell in enumerate(cells):
        for each in contestants:
            prepare(each, cell, needs.words)
        seconds = [
            [
                seconds_of(each, cell, random_ids(cell.tokens, needs.words, run))
                for each in contestants
            ]
            for run in range(runs)
        ]
        ours, *theirs = (
            cell.tokens * cell.batch / median(times) for times in zip(*seconds, strict=True)
        )
        if progress is not None:
            progress(done + 1, len(cells))
        yield needs.row(cell, ours, theirs)


def prepare(contestant: Contestant, cell: Cell, words: int) -> None:
    """Room and context for a cell, and a step that is not counted: memory is there then."""
    contestant.begin(cell.batch, cell.context + cell.tokens)
    if cell.context:
        contestant.feed(random_ids(cell.context, words, CONTEXT_SEED))
    contestant.decode(1)


def seconds_of(contestant: Contestant, cell: Cell, ids: list[int]) -> float:
    contestant.rewind(cell.context)
    started = time.perf_counter()
    if cell.what == "prefill":
        contestant.feed(ids)
    else:
        contestant.decode(cell.tokens)
    return time.perf_counter() - started


def random_ids(count: int, words: int, seed: int) -> list[int]:
    """A prompt: how text is cut into ids is not what is measured."""
    chance = random.Random(seed)
    return [chance.randrange(words) for _ in range(count)]


# --- what a token needs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What one token needs of a model: bytes read, operations done, in which numbers.

    Of the cache, only the engine's own is counted.
    """

    bytes: int  # of the matrices that every token is multiplied with
    ops: int  # two for each of their numbers
    output_ops: int  # of them, those of the last matrix: a prefill does them once
    cache_bytes: int  # of every token before it, one row
    numbers: Numbers  # what most products are of
    words: int  # of the vocabulary

    @classmethod
    def of(cls, llm: LLM) -> Needs:
        """An embedding that is not the output as well is only looked up: not counted."""
        return cls.of_engine(llm) if llm.backend == "engine" else cls.of_torch(llm)

    @classmethod
    def of_engine(cls, llm: LLM) -> Needs:
        from glassllama.native.engine.kv_cache import bytes_per_token

        engine: Any = llm.executor
        matrices, config = engine.weights.matrices, engine.config
        largest = max(matrices, key=lambda matrix: matrix.nbytes * (matrix is not matrices[-1]))
        floats: Numbers = "bfloat16" if largest.weight_type.name == "BF16" else "float32"
        return cls(
            bytes=sum(matrix.nbytes for matrix in matrices),
            ops=2 * sum(matrix.rows * matrix.columns for matrix in matrices),
            output_ops=2 * matrices[-1].rows * matrices[-1].columns,
            cache_bytes=bytes_per_token(config, engine.cache_kind),
            numbers="int8" if largest.weight_type.integer_inputs else floats,
            words=config.vocab_size,
        )

    @classmethod
    def of_torch(cls, llm: LLM) -> Needs:
        model: Any = llm.executor
        skipped = set() if model.config.tie_embeddings else {"tok_embeddings.weight"}
        output = next(iter({"tok_embeddings.weight", "output.weight"} - skipped))
        tensors = {n: p for n, p in model.model.named_parameters() if n not in skipped}
        return cls(
            bytes=sum(tensor.nbytes for tensor in tensors.values()),
            ops=2 * sum(tensor.numel() for tensor in tensors.values()),
            output_ops=2 * tensors[output].numel() if output in tensors else 0,
            cache_bytes=0,
            numbers="float32" if next(iter(tensors.values())).itemsize == 4 else "bfloat16",
            words=llm.executor.config.vocab_size,
        )

    def row(self, cell: Cell, tok_s: float, peers: list[float]) -> Row:
        bytes_s, ops = None, float(self.ops)
        if cell.what == "decode":
            seen = cell.context + cell.tokens / 2  # on average
            bytes_s = tok_s * (self.bytes / cell.batch + seen * self.cache_bytes)
        else:
            ops -= self.output_ops * (1 - 1 / cell.tokens)
        return Row(
            what=cell.what,
            tokens=cell.tokens,
            context=cell.context,
            batch=cell.batch,
            tok_s=tok_s,
            peers=peers,
            bytes_s=bytes_s,
            ops_s=tok_s * ops,
        )


# --- what the machine gives -----------------------------------------------------------------------


def threads_of(how: How) -> int:
    """As the engine counts: more than there are cores are not taken."""
    return min(how.threads or usable_cores(), usable_cores())


def tier_in_use() -> str:
    from glassllama.native.engine.dispatch import tier

    return tier()


def bandwidth(nbytes: int, threads: int) -> float:
    from glassllama.native.engine.roofline import read_bandwidth

    return read_bandwidth(min(nbytes, LARGEST_STRETCH), threads)


def measure_peaks(threads: int) -> dict[str, float]:
    from glassllama.native.engine.roofline import peaks

    return peaks(threads)
