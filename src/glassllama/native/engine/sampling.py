"""Sampling in one native call: the sampler of generation/sampler.py, compiled, with the same ids.

Nothing is sorted, and most logits are read once: the largest logit of every block of 64 shows which
blocks hold an id that is likely enough to matter; only those are read again. Weights (probabilities
times a constant) are whole numbers, so that their sums are exact in any order: see
`softmax_weight`.

Letters: V vocabulary, M candidates.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.native.engine.elementwise import exponential
from glassllama.native.jit.code_cache import save_checksums
from glassllama.native.jit.compile import INTERNAL, inlined, native, reassociating
from glassllama.native.jit.intrinsics import float_from_bits

F32 = np.float32
I32 = np.int32
BLOCK = 64  # logits
UNIT = float(2**34)  # the likeliest id's weight: 2**19 of them add up without rounding
INFINITY = I32(0x7F800000)  # the bits of +inf; NaN's, without their sign, are above
MAGNITUDE = I32(0x7FFFFFFF)
# Instead of an id: the logits hold NaN or +inf, or -inf alone, or penalties make it so.
NO_TOKEN = -1


class SamplerParams(NamedTuple):
    """Settings of a sampler. Factors of 1 and amounts of 0 change nothing."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    temperature: float = 1.0  # 0: the largest logit; the settings below have no effect
    top_k: float = 0.0  # 0: all
    top_p: float = 1.0
    distance: float = math.inf  # from the largest logit, at most


def strictly(function: Any) -> Any:
    """Compile without fusing operations: the results are bit-identical to NumPy's."""
    return native(function, set(), **INTERNAL)


@inlined
def softmax_weight(below: Any) -> Any:
    """2**34 · e^below as a whole number; `below` ≤ 0 is a logit minus the largest."""
    return np.rint(np.float64(exponential(below)) * UNIT)


@inlined
def ordered(bits: Any) -> Any:
    """The bits of a float as an integer that is ordered like the float. Its own inverse."""
    return I32(bits ^ I32((bits >> I32(31)) & MAGNITUDE))


@strictly
def block_maxima(logits: Any, largest: Any) -> Any:
    """The largest of each block of logits (V,) -> whether no logit is NaN.

    They are compared as integers: the processor's maximum of two floats differs from NumPy's if one
    of them is NaN.
    """
    bits, magnitude = logits.view(np.int32), I32(0)
    for block in range(len(largest)):
        some = bits[block * BLOCK : (block + 1) * BLOCK]
        most = ordered(some[0])
        for i in range(len(some)):  # from 0: an index that may be negative keeps LLVM from vectors
            most = max(most, ordered(some[i]))
            magnitude = max(magnitude, I32(some[i] & MAGNITUDE))
        largest[block] = float_from_bits(ordered(most))
    return magnitude <= INFINITY


@strictly
def apply_penalties(logits: Any, seen: Any, counts: Any, params: Any, out: Any) -> None:
    """Repetition, presence and frequency penalties: see generation/sampler.py."""
    repetition, presence = F32(params.repetition), F32(params.presence)
    frequency = F32(params.frequency)
    for id in range(len(logits)):
        x = logits[id]
        if seen[id]:
            x = x / repetition if x > F32(0) else x * repetition
        if counts[id] > 0:
            x -= presence
        out[id] = x - frequency * F32(counts[id])


@strictly
def first_of(logits: Any, largest: Any, top: float) -> Any:
    """The first id whose logit is `top`."""
    for block in range(len(largest)):
        if largest[block] == top:
            for id in range(block * BLOCK, len(logits)):
                if logits[id] == top:
                    return id
    return NO_TOKEN


@strictly
def gather(
    logits: Any, largest: Any, top: float, temperature: float, least: float, out: Any
) -> Any:
    """Collect ids of a weight above 0 and a logit of at least `least` -> how many.

    `out` takes the ids, their logits and their weights.
    """
    ids, values, weights = out
    lowest, count = (least - top) / temperature, 0
    for block in range(len(largest)):
        best = (largest[block] - top) / temperature
        if best < lowest or softmax_weight(best) == 0:
            continue
        first, some = block * BLOCK, logits[block * BLOCK : (block + 1) * BLOCK]
        below, weight = values[first:], weights[first:]
        for i in range(len(some)):
            below[i] = (some[i] - top) / temperature
            weight[i] = softmax_weight(below[i])
        for i in range(len(some)):  # moved together: `count` is never above first + i
            fits = I32(weight[i] > 0) & I32(below[i] >= lowest)
            ids[count], weights[count] = first + i, weight[i]
            values[count] = some[i] if temperature == F32(1) else below[i]
            count += int(fits)
    return count


@strictly
def weighted_select(keys: Any, amounts: Any, count: int, goal: float) -> Any:
    """The key at which the sum of amounts, from the largest key down, reaches `goal`.

    If no key does, the smallest key. Reorders both arrays. Source: Hoare, Algorithm 65: Find
    (1961), with weights.
    """
    first, last, above = 0, count, 0.0
    while True:
        pivot = keys[(first + last) // 2]
        low, i, high, larger, equal = first, first, last, 0.0, 0.0
        while i < high:  # [first, low) are larger than the pivot, [low, i) equal, [high, last) less
            here, amount = keys[i], amounts[i]
            if here > pivot:
                larger += amount
                keys[i], amounts[i] = keys[low], amounts[low]
                keys[low], amounts[low] = here, amount
                low += 1
                i += 1
            elif here < pivot:
                high -= 1
                keys[i], amounts[i] = keys[high], amounts[high]
                keys[high], amounts[high] = here, amount
            else:
                equal += amount
                i += 1
        if above + larger >= goal:
            last = low
        elif above + larger + equal >= goal or high == last:
            return pivot
        else:
            first, above = high, above + larger + equal


@reassociating
def sum_of(amounts: Any) -> Any:
    """The sum of whole numbers, which is exact in any order."""
    total = 0.0
    for amount in amounts:
        total += amount
    return total


@strictly
def least_of_blocks(largest: Any, k: float, keys: Any, amounts: Any) -> Any:
    """A lower bound of the k-th largest logit: the k-th of the blocks' largest."""
    if not 0 < k <= len(largest):
        return F32(-np.inf)
    for n in range(len(largest)):
        keys[n], amounts[n] = largest[n], 1.0
    return F32(weighted_select(keys, amounts, len(largest), k))


@strictly
def keep_top_k(k: float, values: Any, weights: Any, keys: Any, amounts: Any) -> None:
    """Set the weights of all but the k likeliest to 0; ties at the limit stay."""
    for n in range(len(values)):
        keys[n], amounts[n] = values[n], 1.0
    remove(weights, values, weighted_select(keys, amounts, len(values), k))


@strictly
def keep_top_p(p: float, weights: Any, keys: Any, amounts: Any) -> None:
    """Set all weights to 0 but those of the likeliest that together reach p; ties stay."""
    total, some = sum_of(weights), 0
    needless = (1 - p) * total / len(weights)  # all below it together have less than 1 - p
    for n in range(len(weights)):
        keys[some] = amounts[some] = weights[n]
        some += weights[n] >= needless
    remove(weights, weights, weighted_select(keys, amounts, some, p * total))


@strictly
def remove(weights: Any, values: Any, least: float) -> None:
    """Set the weights of values below `least` to 0."""
    for n in range(len(weights)):
        weights[n] = weights[n] if values[n] >= least else 0.0


@strictly
def draw(uniform: float, ids: Any, weights: Any) -> Any:
    """The id in whose share of the sum of weights a uniform number of [0, 1) falls."""
    total, reached, n = sum_of(weights), 0.0, 0
    goal = min(np.floor(uniform * total), total - 1)
    while n + BLOCK < len(weights):
        more = sum_of(weights[n : n + BLOCK])
        if reached + more > goal:
            break
        reached += more
        n += BLOCK
    while reached + weights[n] <= goal:
        reached += weights[n]
        n += 1
    return ids[n]


@strictly
def choose_among(
    logits: Any, largest: Any, top: float, params: Any, uniform: float, tables: Any
) -> Any:
    """Temperature, top-k, top-p, min-p, draw."""
    ids, values, weights, keys, amounts = tables
    temperature = F32(params.temperature)
    bound = least_of_blocks(largest, params.top_k, keys, amounts)
    count = gather(logits, largest, top, temperature, bound, (ids, values, weights))
    values, weights = values[:count], weights[:count]
    if params.top_k > 0:
        keep_top_k(params.top_k, values, weights, keys, amounts)
    if params.top_p < 1:
        keep_top_p(params.top_p, weights, keys, amounts)
    if params.distance < np.inf:
        best = top if temperature == F32(1) else F32(0)
        remove(weights, values, best - F32(params.distance))
    return draw(uniform, ids, weights)


def choose(
    logits: Any, seen: Any, counts: Any, params: Any, uniform: float, tables: Any, rows: Any
) -> Any:
    """An id for logits (V,), by `params` and one random number; NO_TOKEN if there is none."""
    largest, penalized = rows
    if not block_maxima(logits, largest) or not np.isfinite(largest.max()):
        return NO_TOKEN
    if len(penalized) > 0:
        apply_penalties(logits, seen, counts, params, penalized)
        logits = penalized
        if not block_maxima(logits, largest) or not np.isfinite(largest.max()):
            return NO_TOKEN
    top = largest.max()
    if params.temperature == 0:
        return first_of(logits, largest, top)
    return choose_among(logits, largest, top, params, uniform, tables)


class NativeSampler:
    """The compiled sampler of one request, with buffers of its own: logits (V,) -> an id."""

    def __init__(self, vocab_size: int, params: SamplerParams) -> None:
        self._choose = compiled_choose()
        self._params = SamplerParams(*map(float, params))  # 1 and 1.0 would be compiled twice
        self._tables: tuple[NDArray[Any], ...] = (
            np.empty(vocab_size, np.int32),  # ids of the candidates
            np.empty(vocab_size, np.float32),  # their logits, divided by the temperature
            *(np.empty(vocab_size, np.float64) for _ in range(3)),  # weights; scratch
        )
        changed = params[:3] != (1, 0, 0)
        self._rows = (
            np.empty(-(-vocab_size // BLOCK), np.float32),  # the largest logit of each block
            np.empty(vocab_size if changed else 0, np.float32),  # logits after penalties
        )

    def __call__(
        self,
        logits: NDArray[np.float32],
        seen: NDArray[np.bool_],
        counts: NDArray[np.int32],
        uniform: float,
    ) -> int:
        """The id for logits (V,); -1 if the largest is not finite.

        `seen` and `counts` (V,): whether prompt or answer hold an id, how often the answer does.
        `uniform` is a number in [0, 1) and decides which id is drawn.
        """
        assert len(logits) == len(seen) == len(counts) == len(self._tables[0])
        id: int = self._choose(
            logits, seen, counts, self._params, uniform, self._tables, self._rows
        )
        return id


@lru_cache(maxsize=1)
def compiled_choose() -> Any:
    """The machine code of `choose`, from disk or compiled now, when it is first needed."""
    machine_code: Any = native(choose, set())
    machine_code(*example())
    if machine_code.stats.cache_misses:
        save_checksums()
    return machine_code


def example() -> tuple[Any, ...]:
    """Arguments of `choose` for a vocabulary of one."""
    one, (a, b, c) = np.zeros(1, np.float32), np.zeros((3, 1))
    seen, counts = np.zeros(1, np.bool_), np.zeros(1, np.int32)
    tables = (np.zeros(1, np.int32), one.copy(), a, b, c)
    return one, seen, counts, SamplerParams(), 0.0, tables, (one.copy(), one[:0])
