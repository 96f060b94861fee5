"""How surprised a model is by a text: perplexity over sliding windows.

    ids      t0 t1 t2 t3 t4 t5 t6 t7 t8 t9
    window 1  · scored ────┤
    window 2        seen   ├ scored ┤
    window 3                 seen   ├ …         a step to the right is `stride` ids

Every id is scored once, by a pass that sees at least window − stride of the ids before it (all of
them, near the beginning), and each pass begins with the model's begin-of-text id if it has one.
Without such an id nothing comes before t0, which is then not scored.

Source: the sliding-window evaluation of Transformer-XL (Dai et al., 2019) in strided form, as in
Hugging Face's guide "Perplexity of fixed-length models".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import Executor, NewTokens, Progress

BLOCK_BYTES = 1 << 26  # of logits in memory at once


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a text cost. One nat is a factor e of probability, ln 2 of it are one bit."""

    tokens: int  # scored
    unscored: int  # 1 where nothing could come before the first id, else 0
    nats: float  # minus the sum of the log probabilities

    @property
    def perplexity(self) -> float:
        """Among how many equally likely tokens, on average, the model might as well have chosen."""
        return math.exp(self.nats / self.tokens)

    def bits_per_byte(self, nbytes: int) -> float:
        """The same for `nbytes` of text, which compares models with different vocabularies."""
        return self.nats / math.log(2) / nbytes


def score(
    executor: Executor,
    ids: Sequence[int],
    *,
    window: int,
    stride: int,
    bos: int | None = None,
    progress: Progress | None = None,
) -> Score:
    """The score of `ids`, a text without begin-of-text id; `progress` counts scored ids.

    Raises GenerationError: window or stride out of range, nothing to score, NaN in the logits.
    """
    longest = executor.config.max_seq_len
    if not 2 <= window <= longest:
        raise GenerationError(f"window must be 2 to {longest}, the model's context, got {window}")
    if not 1 <= stride < window:
        raise GenerationError(f"stride must be 1 to window - 1 = {window - 1}, got {stride}")
    unscored = 1 if bos is None else 0
    if len(ids) <= unscored:
        raise GenerationError(f"perplexity needs a text of more tokens, got {len(ids)}")
    nats = 0.0
    for start, first, end in passes(len(ids), window, stride, has_bos=bos is not None):
        seen = [*([] if bos is None else [bos]), *ids[start:first]]
        nats += cost(executor, seen, ids[first:end])
        if not math.isfinite(nats):
            raise GenerationError(f"the logits of ids {first} to {end - 1} are not finite")
        if progress is not None:
            progress(end - unscored, len(ids) - unscored)
    return Score(tokens=len(ids) - unscored, unscored=unscored, nats=nats)


def passes(
    length: int, window: int, stride: int, *, has_bos: bool
) -> Iterator[tuple[int, int, int]]:
    """(start, first, end) of each pass: ids[start:first] are seen, ids[first:end] are scored."""
    capacity = window - 1 if has_bos else window  # for ids of the text
    start, first, end = 0, 0 if has_bos else 1, min(capacity, length)
    while first < end:
        yield start, first, end
        first, end = end, min(end + stride, length)
        start = max(0, end - capacity)


def cost(executor: Executor, seen: Sequence[int], scored: Sequence[int]) -> float:
    """Minus the log probability of the ids `scored` after those `seen`, in nats."""
    cache = executor.new_cache()
    sequence = cache.add()
    logits = executor.forward([NewTokens(sequence, seen)], cache)  # (1, V)
    found = [log_probabilities(logits, scored[:1])]
    step = max(1, BLOCK_BYTES // logits[0].nbytes)
    for first in range(0, len(scored) - 1, step):
        last = min(first + step, len(scored) - 1)
        logits = executor.forward([NewTokens(sequence, scored[first:last], "all")], cache)  # (T, V)
        found.append(log_probabilities(logits, scored[first + 1 : last + 1]))
    return -float(np.concatenate(found).sum())


def log_probabilities(logits: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float64]:
    """ln softmax(logits)[t, ids[t]] for each row t: (T, V) -> (T,)."""
    largest = logits.max(axis=1, keepdims=True)  # (T, 1)
    totals = np.exp(logits - largest).sum(axis=1, dtype=np.float64)  # (T,)
    chosen = logits[np.arange(len(ids)), list(ids)]  # (T,)
    costs: NDArray[np.float64] = np.log(totals) - (chosen - largest[:, 0])  # (T,)
    return -costs
