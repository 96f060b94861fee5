"""What `glassllama bench` measures."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from glassllama.base.machine import usable_cores
from glassllama.cli.memory import peak_memory
from glassllama.cli.model_facts import packed_weights
from glassllama.cli.options import How

if TYPE_CHECKING:
    from glassllama.base.interfaces import Progress
    from glassllama.llm import LLM

SEED = 0  # the prompt is random ids: how text is cut into them is not what is measured
BANDWIDTH_BYTES = 1 << 28  # larger than the caches of most processors
BANDWIDTH_RUNS = 5
WORD_BYTES = 8


class Peer(Protocol):
    """Another program on the same file, driven as ours is."""

    @property
    def name(self) -> str: ...  # with its version

    def run(self, ids: list[int], new: int) -> Rates:
        """Read the ids, then make `new` tokens, the likeliest each time."""
        ...


@dataclass(frozen=True)
class Rates:
    """Tokens per second."""

    prefill: float
    decode: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians over the runs. Rates in tokens per second, times in seconds, sizes in bytes."""

    model: str
    backend: str
    threads: int
    runs: int
    load_s: float
    first_token_s: float  # of the very first run: with compiling, if there is any
    prefill_tokens: int
    prefill_tok_s: float
    decode_tokens: int
    decode_tok_s: float
    bytes_per_token: int  # weights that every new token needs
    bandwidth: float | None  # bytes per second, read by numpy on as many threads; CPU only
    bound_tok_s: float | None  # bandwidth / bytes_per_token: no decode can be faster
    peak_memory: int | None
    peer: str | None = None  # measured in turns with ours
    peer_prefill_tok_s: float | None = None
    peer_decode_tok_s: float | None = None


def measure(
    llm: LLM,
    how: How,
    prompt: int,
    new: int,
    runs: int,
    progress: Progress | None,
    peer: Peer | None = None,
) -> Measured:
    """Several runs of one prompt of random ids. Raises GenerationError: no room for them."""
    chance = random.Random(SEED)
    ids = [chance.randrange(llm.executor.config.vocab_size) for _ in range(prompt)]
    started = time.perf_counter()
    llm.generate(ids[:1], max_tokens=1)
    first_token = time.perf_counter() - started
    ours, theirs = in_turns(llm, peer, ids, new, runs, progress)
    threads, peak = threads_of(how), peak_memory()  # before our own big array
    needed = bytes_per_token(llm, exact=how.exact)
    bandwidth = read_bandwidth(threads) if how.device == "cpu" else None
    return Measured(
        model=llm.name,
        backend=llm.backend,
        threads=threads,
        runs=runs,
        load_s=llm.load_seconds,
        first_token_s=first_token,
        prefill_tokens=prompt,
        prefill_tok_s=median(r.prefill for r in ours),
        decode_tokens=new,
        decode_tok_s=median(r.decode for r in ours),
        bytes_per_token=needed,
        bandwidth=bandwidth,
        bound_tok_s=None if bandwidth is None else bandwidth / needed,
        peak_memory=peak,
        peer=None if peer is None else peer.name,
        peer_prefill_tok_s=median(r.prefill for r in theirs) if theirs else None,
        peer_decode_tok_s=median(r.decode for r in theirs) if theirs else None,
    )


def in_turns(
    llm: LLM, peer: Peer | None, ids: list[int], new: int, runs: int, progress: Progress | None
) -> tuple[list[Rates], list[Rates]]:
    """Our rates and the peer's, run by run, so that a machine that slows down slows both."""
    ours, theirs = [], []
    for run in range(runs):
        t = llm.generate(ids, max_tokens=new, ignore_eos=True, speculation=False).timings
        ours.append(Rates(t.prompt_tokens / t.prefill_s, t.decode_tokens / t.decode_s))
        if peer is not None:
            theirs.append(peer.run(ids, new))
        if progress is not None:
            progress(run + 1, runs)
    return ours, theirs


def threads_of(how: How) -> int:
    return how.threads or usable_cores()


def bytes_per_token(llm: LLM, *, exact: bool) -> int:
    """Bytes of the matrices that every token is multiplied with; of an untied embedding, none."""
    unused = set() if llm.executor.config.tie_embeddings else {"tok_embeddings.weight"}
    if llm.backend == "engine":
        sizes = packed_weights(llm.checkpoint, exact=exact)
    else:
        model: Any = llm.executor
        sizes = {name: tensor.nbytes for name, tensor in model.model.named_parameters()}
    return sum(size for name, size in sizes.items() if name not in unused)


def read_bandwidth(threads: int) -> float:
    """Bytes per second that numpy reads with so many threads: the best of a few runs."""
    parts = np.array_split(np.ones(BANDWIDTH_BYTES // WORD_BYTES, np.uint64), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_RUNS):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            seconds.append(time.perf_counter() - started)
    return BANDWIDTH_BYTES / min(seconds)
