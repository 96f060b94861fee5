"""Benchmark: tokens per second of a loaded model, beside other programs and the machine's limits.

    llm = load("smollm2-135m")
    result = benchmark(llm, Grid(prompts=[512], contexts=[0, 1024]))

A cell of the grid is one measurement: a number of tokens read at once (prefill) or generated one
after another (decode), after a given context, in a given number of sequences. In each run every
program measures the cell once, one after the other, so that a machine that slows down affects all
of them; the median over the runs counts. The limits are those of the roofline model (Williams,
Waterman and Patterson, 2009): memory bandwidth for decode, arithmetic for prefill.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Literal

from glassllama.base.errors import GenerationError, GlassError, MissingExtraError
from glassllama.base.interfaces import NewTokens
from glassllama.base.machine import peak_memory, usable_cores

if TYPE_CHECKING:
    from glassllama.base.interfaces import Progress
    from glassllama.llm import LLM

MAX_BANDWIDTH_BYTES = 1 << 30  # read to measure bandwidth: far more than any processor caches
CONTEXT_SEED = 1 << 20  # of the context's ids; those of a prompt have the number of the run
FIRST_ID = 1  # decoding starts with this id in the first sequence, the next one in the second, …
CPU_INFO = Path("/proc/cpuinfo")
CPU_FLAGS = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")
Number = Literal["int8", "bfloat16", "float32"]


# --- results --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One measurement: `tokens` read at once, or generated one by one in `batch` sequences."""

    what: Literal["prefill", "decode"]
    tokens: int
    context: int = 0  # tokens in the KV cache before
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which cells: every prompt, every context with one sequence, every batch above one."""

    prompts: Sequence[int] = (512,)
    contexts: Sequence[int] = (0,)
    batches: Sequence[int] = (1,)
    new: int = 64  # tokens of a decode
    runs: int = 3

    def cells(self, max_seq_len: int) -> list[Cell]:
        """Those that fit into `max_seq_len` tokens. Raises GenerationError if none does."""
        cells = [
            *(Cell("prefill", n) for n in self.prompts),
            *(Cell("decode", self.new, context) for context in self.contexts),
            *(Cell("decode", self.new, 0, batch) for batch in self.batches if batch > 1),
        ]
        fitting = [cell for cell in cells if cell.tokens + cell.context <= max_seq_len]
        if not fitting:
            raise GenerationError(
                f"the model's context is {max_seq_len} tokens: use a smaller --prompt and --new"
            )
        return fitting


@dataclass(frozen=True, kw_only=True)
class CellResult(Cell):
    """Medians of one cell: tokens per second of all sequences together."""

    tok_s: float
    peers: list[float]  # in the order of BenchmarkResult.peers
    bytes_s: float | None  # bytes of weights and KV cache read per second; decode only
    ops_s: float  # multiplications and additions of matrix products per second

    @property
    def ratio(self) -> float | None:
        """Our speed divided by that of the fastest peer."""
        return self.tok_s / max(self.peers) if self.peers else None


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Rates in tokens per second, times in seconds, sizes in bytes."""

    model: str
    stored_as: dict[str, int]  # bytes of the file by number format
    backend: str
    exact: bool
    tier: str | None  # kernels in use; engine only
    threads: int
    runs: int
    machine: dict[str, Any]
    versions: dict[str, str]
    load_s: float  # including imports
    first_token_s: float  # the first token of the process: includes compiling, if there is any
    bytes_per_token: int  # weights that are read for every new token
    ops_per_token: int  # two per weight
    bandwidth: float | None  # bytes per second that memory can be read at; CPU only
    bound_tok_s: float | None  # bandwidth / bytes_per_token: upper limit of decode, one sequence
    peaks: dict[str, float]  # operations per second, by dot product; CPU only
    peak: str | None  # the entry of `peaks` that this model's number format uses
    peak_memory: int | None
    peers: list[dict[str, Any]]  # name, built_with, load_s, first_token_s
    rows: list[CellResult]


# --- programs that are measured -------------------------------------------------------------------


class LLMRunner:
    """This package: the executor of `llm`, without sampler and speculation.

    The engine reuses equal prefixes of earlier sequences, so each prompt starts differently.
    """

    def __init__(self, llm: LLM) -> None:
        self._executor = llm.executor
        self._cache: Any = None
        self._sequences: list[int] = []

    def reset(self, batch: int, max_tokens: int) -> None:
        """A new KV cache for `batch` sequences of up to `max_tokens` tokens."""
        self._cache = None  # free its memory first
        self._cache = self._executor.new_cache()
        self._sequences = [self._cache.add() for _ in range(batch)]

    def prefill(self, ids: list[int]) -> None:
        """Process the ids in the first sequence, up to the logits after the last."""
        self._executor.forward([NewTokens(self._sequences[0], ids)], self._cache)

    def rewind(self, length: int) -> None:
        """Remove everything after the first `length` tokens from every sequence."""
        for sequence in self._sequences:
            self._cache.rewind(sequence, length)

    def decode(self, new: int) -> None:
        """`new` steps in every sequence: FIRST_ID + n, then always the likeliest id."""
        ids = [FIRST_ID + n for n in range(len(self._sequences))]
        for _ in range(new):
            pairs = zip(self._sequences, ids, strict=True)
            batch = [NewTokens(sequence, [id]) for sequence, id in pairs]
            ids = self._executor.forward(batch, self._cache).argmax(-1).tolist()  # (B, V) -> (B,)


class LlamaCppRunner:
    """llama.cpp through llama-cpp-python, on the same GGUF file with the same number of threads.

    Its methods are those of LLMRunner; everything else is at llama.cpp's defaults. A batch is
    several sequences of one context, passed to llama_decode together.
    """

    def __init__(self, path: Path, threads: int, *, repack: bool = True) -> None:
        """`repack`: convert weights to a layout for this processor, as llama.cpp does by default.

        Raises MissingExtraError, and GlassError if llama.cpp cannot read the file.
        """
        started = time.perf_counter()
        try:
            import llama_cpp
        except ImportError:
            raise MissingExtraError("the comparison with llama.cpp", "bench") from None
        from glassllama.formats.tensor_file import format_of

        if format_of(path) != "gguf":
            raise GlassError(f"{path}: llama.cpp reads GGUF files only; leave out --vs")
        self._cpp: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = repack
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise GlassError(f"{path}: llama.cpp {llama_cpp.__version__} cannot load it")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._threads, self._max_batch = threads, 0
        self._context: Any = None
        self._batch: Any = None  # llama_batch
        self._lengths: list[int] = []  # tokens of each sequence
        self.name = f"llama.cpp{'' if repack else '-as-stored'} {llama_cpp.__version__}"
        self.built_with = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.load_s = time.perf_counter() - started

    def reset(self, batch: int, max_tokens: int) -> None:
        if self._context is not None:
            self._cpp.llama_free(self._context)
            self._cpp.llama_batch_free(self._batch)
        params = self._cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = max_tokens * batch, batch
        params.n_threads = params.n_threads_batch = self._threads
        self._context = self._cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise GenerationError(
                f"{self.name} cannot allocate {batch} sequences of {max_tokens} tokens"
            )
        self._max_batch = int(params.n_batch)
        self._batch = self._cpp.llama_batch_init(self._max_batch, 0, 1)
        self._lengths = [0] * batch

    def prefill(self, ids: list[int]) -> None:
        for first in range(0, len(ids), self._max_batch):
            part = [*enumerate(ids)][first : first + self._max_batch]
            self._decode([(id, 0, n == len(ids) - 1) for n, id in part])

    def rewind(self, length: int) -> None:
        memory = self._cpp.llama_get_memory(self._context)
        for row in range(len(self._lengths)):
            self._cpp.llama_memory_seq_rm(memory, row, length, -1)
            self._lengths[row] = length

    def decode(self, new: int) -> None:
        ids = [FIRST_ID + row for row in range(len(self._lengths))]
        for _ in range(new):
            self._decode([(id, row, True) for row, id in enumerate(ids)])
            ids = list(self._likeliest())

    def _decode(self, tokens: list[tuple[int, int, bool]]) -> None:
        """One call of llama_decode with (id, sequence, whether to compute logits) of each token."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for n, (id, row, with_logits) in enumerate(tokens):
            batch.token[n], batch.pos[n], batch.logits[n] = id, self._lengths[row], with_logits
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
            self._lengths[row] += 1
        if self._cpp.llama_decode(self._context, batch) != 0:
            raise GenerationError(f"{self.name} failed on {len(tokens)} tokens")

    def _likeliest(self) -> Iterator[int]:
        import numpy as np

        for row in range(len(self._lengths)):
            logits = self._cpp.llama_get_logits_ith(self._context, row)
            yield int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


Runner = LLMRunner | LlamaCppRunner


# --- the roofline ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """What one token requires: bytes read, operations, and their number format.

    An embedding that is not also the output matrix is looked up, not multiplied: not counted. The
    KV cache is counted for the engine only.
    """

    bytes: int  # of the matrices that every token is multiplied with
    ops: int  # two per weight
    output_ops: int  # those of the output matrix: once per prefill
    cache_bytes: int  # per token of context and sequence
    numbers: Number  # format of most products
    vocab_size: int
    windows: Sequence[int | None] = (None,)  # of each layer: tokens of the cache that it reads

    @classmethod
    def of(cls, llm: LLM) -> Roofline:
        return cls.of_engine(llm) if llm.backend == "engine" else cls.of_torch(llm)

    @classmethod
    def of_engine(cls, llm: LLM) -> Roofline:
        from glassllama.native.engine.kv_cache import bytes_per_token

        engine: Any = llm.executor
        matrices, config = engine.weights.matrices, engine.config
        largest = max(matrices, key=lambda matrix: matrix.nbytes * (matrix is not matrices[-1]))
        floats: Number = "bfloat16" if largest.weight_type.name == "BF16" else "float32"
        return cls(
            bytes=sum(matrix.nbytes for matrix in matrices),
            ops=2 * sum(matrix.rows * matrix.columns for matrix in matrices),
            output_ops=2 * matrices[-1].rows * matrices[-1].columns,
            cache_bytes=bytes_per_token(engine.plan, engine.cache_kind),
            numbers=floats if largest.weight_type.is_float else "int8",
            vocab_size=config.vocab_size,
            windows=[block.attention.window for block in engine.plan.blocks],
        )

    @classmethod
    def of_torch(cls, llm: LLM) -> Roofline:
        executor: Any = llm.executor
        skipped = set() if executor.config.tie_embeddings else {"tok_embeddings.weight"}
        output = next(iter({"tok_embeddings.weight", "output.weight"} - skipped))
        tensors = {n: p for n, p in executor.model.named_parameters() if n not in skipped}
        return cls(
            bytes=sum(tensor.nbytes for tensor in tensors.values()),
            ops=2 * sum(tensor.numel() for tensor in tensors.values()),
            output_ops=2 * tensors[output].numel() if output in tensors else 0,
            cache_bytes=0,
            numbers="float32" if next(iter(tensors.values())).itemsize == 4 else "bfloat16",
            vocab_size=llm.executor.config.vocab_size,
        )

    def result(self, cell: Cell, tok_s: float, peers: list[float]) -> CellResult:
        bytes_s, ops = None, float(self.ops)
        if cell.what == "decode":
            context = cell.context + cell.tokens / 2  # on average
            read = mean(min(context, window or context) for window in self.windows)
            bytes_s = tok_s * (self.bytes / cell.batch + read * self.cache_bytes)
        else:
            ops -= self.output_ops * (1 - 1 / cell.tokens)
        return CellResult(
            **vars(cell), tok_s=tok_s, peers=peers, bytes_s=bytes_s, ops_s=tok_s * ops
        )


# --- measuring ------------------------------------------------------------------------------------


def benchmark(
    llm: LLM,
    grid: Grid | None = None,
    *,
    peers: Sequence[LlamaCppRunner] = (),
    threads: int | None = None,
    exact: bool = False,
    on_cpu: bool = True,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measure all cells of `grid` that fit the model; `progress` counts cells.

    `threads` and `exact` are what `load` was given; memory bandwidth and peak arithmetic are
    measured for models on the CPU. Raises GenerationError if no cell fits.
    """
    from glassllama.native.engine.dispatch import tier
    from glassllama.native.roofline import peaks as peak_operations
    from glassllama.weights.inspection import stored_formats

    grid = grid or Grid()
    cells = grid.cells(llm.executor.config.max_seq_len)
    machine = machine_info()  # the load average before we add to it
    runners: list[Runner] = [LLMRunner(llm), *peers]
    roofline, threads = Roofline.of(llm), used_threads(threads)
    bandwidth = read_bandwidth(roofline.bytes, threads) if on_cpu else None
    firsts = [first_token_seconds(runner) for runner in runners]
    rows = list(measure_cells(cells, runners, grid.runs, roofline, progress))
    peak_bytes = peak_memory()  # includes the peers
    if bandwidth is not None:  # varies on shared machines: the higher value is the limit
        bandwidth = max(bandwidth, read_bandwidth(roofline.bytes, threads))
    peaks = peak_operations(threads) if on_cpu else {}
    return BenchmarkResult(
        model=llm.name,
        stored_as={row["type"]: row["bytes"] for row in stored_formats(llm.checkpoint)},
        backend=llm.backend, exact=exact, threads=threads, runs=grid.runs, machine=machine,
        tier=tier() if llm.backend == "engine" else None, versions=versions(),
        load_s=llm.load_seconds, first_token_s=firsts[0], bytes_per_token=roofline.bytes,
        ops_per_token=roofline.ops, bandwidth=bandwidth,
        bound_tok_s=None if bandwidth is None else bandwidth / roofline.bytes, peaks=peaks,
        peak=next((name for name in peaks if name.startswith(roofline.numbers)), None),
        peak_memory=peak_bytes, rows=rows,
        peers=[
            {"name": peer.name, "built_with": peer.built_with, "load_s": peer.load_s,
             "first_token_s": first}
            for peer, first in zip(peers, firsts[1:], strict=True)
        ],
    )  # fmt: skip


def first_token_seconds(runner: Runner) -> float:
    runner.reset(1, 2)
    started = time.perf_counter()
    runner.decode(1)
    return time.perf_counter() - started


def measure_cells(
    cells: list[Cell],
    runners: Sequence[Runner],
    runs: int,
    roofline: Roofline,
    progress: Progress | None,
) -> Iterator[CellResult]:
    for done, cell in enumerate(cells, start=1):
        for runner in runners:
            prepare(runner, cell, roofline.vocab_size)
        prompts = [random_ids(cell.tokens, roofline.vocab_size, run) for run in range(runs)]
        seconds = [[seconds_of(runner, cell, ids) for runner in runners] for ids in prompts]
        ours, *theirs = (
            cell.tokens * cell.batch / median(times) for times in zip(*seconds, strict=True)
        )
        if progress is not None:
            progress(done, len(cells))
        yield roofline.result(cell, ours, theirs)


def prepare(runner: Runner, cell: Cell, vocab_size: int) -> None:
    """A KV cache with the cell's context, and one step that is not timed: allocates memory."""
    runner.reset(cell.batch, cell.context + cell.tokens)
    if cell.context:
        runner.prefill(random_ids(cell.context, vocab_size, CONTEXT_SEED))
    runner.decode(1)


def seconds_of(runner: Runner, cell: Cell, ids: list[int]) -> float:
    runner.rewind(cell.context)
    started = time.perf_counter()
    if cell.what == "prefill":
        runner.prefill(ids)
    else:
        runner.decode(cell.tokens)
    return time.perf_counter() - started


def random_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    """Prompts are random ids: the speed of tokenizing is not measured."""
    generator = random.Random(seed)
    return [generator.randrange(vocab_size) for _ in range(count)]


# --- the machine ----------------------------------------------------------------------------------


def used_threads(threads: int | None) -> int:
    """As the engine counts: never more than there are cores."""
    return min(threads or usable_cores(), usable_cores())


def read_bandwidth(nbytes: int, threads: int) -> float:
    from glassllama.native import roofline

    return roofline.read_bandwidth(min(nbytes, MAX_BANDWIDTH_BYTES), threads)


def machine_info() -> dict[str, Any]:
    """Processor, usable cores, the flags that kernels depend on, and the load average."""
    try:  # Linux; the first processor
        lines = CPU_INFO.read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    cpu = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Versions of what the results depend on."""
    from importlib.metadata import version

    from glassllama import __version__

    packages = {name: version(name) for name in ("numba", "numpy")}
    return {"glassllama": __version__, "python": platform.python_version(), **packages}
