"""From logits to an id in one native call: generation's sampler compiled, the same to the id.

Nothing is sorted and little is touched: the largest logit of every 64 shows which blocks hold an id
that is likely enough to matter at all; only those are looked at again. Weights (probabilities
times a constant) are whole numbers, so that their sums are exact in any order: see `weigh`.

Letters: V vocabulary, M candidates.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.code_cache import seal
from glassllama.engine.compiled import INSIDE, inlined, loosely, native
from glassllama.engine.elementwise import exponential
from glassllama.engine.intrinsics import float_from_bits

F32 = np.float32
I32 = np.int32
CUT = 64  # logits of a block
UNIT = float(2**34)  # the likeliest id's weight: 2**19 of them add up without rounding
INFINITY = I32(0x7F800000)  # the bits of +inf; NaN's, without their sign, are above
MAGNITUDE = I32(0x7FFFFFFF)
NOTHING = (
    -1
)  # instead of an id: the logits hold NaN or +inf, or -inf alone, or penalties make it so


class Choice(NamedTuple):
    """How an id is chosen. Factors of 1 and amounts of 0 change nothing."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    temperature: float = 1.0  # 0: the largest logit, and nothing below is looked at
    top_k: float = 0.0  # 0: all
    top_p: float = 1.0
    distance: float = math.inf  # from the largest logit, at most


def exactly(function: Any) -> Any:
    """Compiled as it is written, no two operations made one: numpy's numbers, to the bit."""
    return native(function, set(), **INSIDE)


@inlined
def weigh(below: Any) -> Any:
    """2**34 · e^below as a whole number, for a logit that is `below` (≤ 0) the largest."""
    return np.rint(np.float64(exponential(below)) * UNIT)


@inlined
def ordered(bits: Any) -> Any:
    """A float's bits as an integer that compares as the float does; its own inverse."""
    return I32(bits ^ I32((bits >> I32(31)) & MAGNITUDE))


@exactly
def find_largest(logits: Any, largest: Any) -> Any:
    """The largest of each block of logits (V,) -> whether none of all is NaN.

    As integers: the processor's largest of two floats is not that of numpy where one is NaN.
    """
    bits, loudest = logits.view(np.int32), I32(0)
    for block in range(len(largest)):
        some = bits[block * CUT : (block + 1) * CUT]
        most = ordered(some[0])
        for i in range(len(some)):  # from 0: an index that may be negative keeps LLVM from vectors
            most = max(most, ordered(some[i]))
            loudest = max(loudest, I32(some[i] & MAGNITUDE))
        largest[block] = float_from_bits(ordered(most))
    return loudest <= INFINITY


@exactly
def punish(logits: Any, seen: Any, said: Any, choice: Any, out: Any) -> None:
    """Repetition, presence and frequency penalties: see generation/sampler.py."""
    repetition, presence = F32(choice.repetition), F32(choice.presence)
    frequency = F32(choice.frequency)
    for id in range(len(logits)):
        x = logits[id]
        if seen[id]:
            x = x / repetition if x > F32(0) else x * repetition
        if said[id] > 0:
            x -= presence
        out[id] = x - frequency * F32(said[id])


@exactly
def first_of(logits: Any, largest: Any, top: float) -> Any:
    """The first id whose logit is `top`."""
    for block in range(len(largest)):
        if largest[block] == top:
            for id in range(block * CUT, len(logits)):
                if logits[id] == top:
                    return id
    return NOTHING


@exactly
def gather(logits: Any, largest: Any, top: float, cool: float, least: float, out: Any) -> Any:
    """Ids of a weight above 0 and a logit of at least `least` -> how many; values and weights."""
    ids, values, weights = out
    lowest, count = (least - top) / cool, 0
    for block in range(len(largest)):
        best = (largest[block] - top) / cool
        if best < lowest or weigh(best) == 0:
            continue
        first, some = block * CUT, logits[block * CUT : (block + 1) * CUT]
        below, weight = values[first:], weights[first:]
        for i in range(len(some)):
            below[i] = (some[i] - top) / cool
            weight[i] = weigh(below[i])
        for i in range(len(some)):  # moved together: `count` is never above first + i
            wanted = I32(weight[i] > 0) & I32(below[i] >= lowest)
            ids[count], weights[count] = first + i, weight[i]
            values[count] = some[i] if cool == F32(1) else below[i]
            count += int(wanted)
    return count


@exactly
def border(keys: Any, amounts: Any, count: int, goal: float) -> Any:
    """The key at which amounts, added from the largest key down, reach `goal`, or the least key.

    Reorders both as far as it needs. Source: Hoare, Algorithm 65: Find (1961), with weights.
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


@loosely
def total_of(amounts: Any) -> Any:
    """Their sum; whole numbers, so no order of adding them up is another's."""
    total = 0.0
    for amount in amounts:
        total += amount
    return total


@exactly
def least_of_blocks(largest: Any, k: float, keys: Any, amounts: Any) -> Any:
    """A logit that at least k others reach: the k-th of the blocks' largest."""
    if not 0 < k <= len(largest):
        return F32(-np.inf)
    for n in range(len(largest)):
        keys[n], amounts[n] = largest[n], 1.0
    return F32(border(keys, amounts, len(largest), k))


@exactly
def keep_top_k(k: float, values: Any, weights: Any, keys: Any, amounts: Any) -> None:
    """Weigh all but the k likeliest at 0; ties at the border stay."""
    for n in range(len(values)):
        keys[n], amounts[n] = values[n], 1.0
    remove(weights, values, border(keys, amounts, len(values), k))


@exactly
def keep_top_p(p: float, weights: Any, keys: Any, amounts: Any) -> None:
    """Weigh all at 0 but the likeliest that together reach p; ties at the border stay."""
    total, some = total_of(weights), 0
    needless = (1 - p) * total / len(weights)  # all below it together have less than 1 - p
    for n in range(len(weights)):
        keys[some] = amounts[some] = weights[n]
        some += weights[n] >= needless
    remove(weights, weights, border(keys, amounts, some, p * total))


@exactly
def remove(weights: Any, values: Any, least: float) -> None:
    """Weigh those at 0 whose value is less than `least`."""
    for n in range(len(weights)):
        weights[n] = weights[n] if values[n] >= least else 0.0


@exactly
def draw(uniform: float, ids: Any, weights: Any) -> Any:
    """The id in whose share of the sum of weights a number from 0 to 1 falls."""
    total, reached, n = total_of(weights), 0.0, 0
    goal = min(np.floor(uniform * total), total - 1)
    while n + CUT < len(weights):
        more = total_of(weights[n : n + CUT])
        if reached + more > goal:
            break
        reached += more
        n += CUT
    while reached + weights[n] <= goal:
        reached += weights[n]
        n += 1
    return ids[n]


@exactly
def choose_among(
    logits: Any, largest: Any, top: float, choice: Any, uniform: float, tables: Any
) -> Any:
    """Temperature, top-k, top-p, min-p, draw."""
    ids, values, weights, keys, amounts = tables
    cool = F32(choice.temperature)
    bound = least_of_blocks(largest, choice.top_k, keys, amounts)
    count = gather(logits, largest, top, cool, bound, (ids, values, weights))
    values, weights = values[:count], weights[:count]
    if choice.top_k > 0:
        keep_top_k(choice.top_k, values, weights, keys, amounts)
    if choice.top_p < 1:
        keep_top_p(choice.top_p, weights, keys, amounts)
    if choice.distance < np.inf:
        best = top if cool == F32(1) else F32(0)
        remove(weights, values, best - F32(choice.distance))
    return draw(uniform, ids, weights)


def choose(
    logits: Any, seen: Any, said: Any, choice: Any, uniform: float, tables: Any, rows: Any
) -> Any:
    """An id for logits (V,), by `choice` and one random number; NOTHING where there is none."""
    largest, punished = rows
    if not find_largest(logits, largest) or not np.isfinite(largest.max()):
        return NOTHING
    if len(punished) > 0:
        punish(logits, seen, said, choice, punished)
        logits = punished
        if not find_largest(logits, largest) or not np.isfinite(largest.max()):
            return NOTHING
    top = largest.max()
    if choice.temperature == 0:
        return first_of(logits, largest, top)
    return choose_among(logits, largest, top, choice, uniform, tables)


class Chooser:
    """The choosing of one request, with room of its own: logits (V,) -> an id."""

    def __init__(self, vocab_size: int, choice: Choice) -> None:
        self._choose = compiled_choose()
        self._choice = Choice(*map(float, choice))  # 1 and 1.0 are two machine codes
        self._tables: tuple[NDArray[Any], ...] = (
            np.empty(vocab_size, np.int32),  # ids of the candidates
            np.empty(vocab_size, np.float32),  # their logits, cooled
            *(np.empty(vocab_size, np.float64) for _ in range(3)),  # weights; room for `border`
        )
        changed = choice[:3] != (1, 0, 0)
        self._rows = (
            np.empty(-(-vocab_size // CUT), np.float32),  # the largest logit of each block
            np.empty(vocab_size if changed else 0, np.float32),  # logits after penalties
        )

    def __call__(
        self,
        logits: NDArray[np.float32],
        seen: NDArray[np.bool_],
        said: NDArray[np.int32],
        uniform: float,
    ) -> int:
        """The id for logits (V,); -1 where they hold no finite largest value.

        `seen` and `said` (V,): whether prompt or answer hold an id, how often the answer does.
        `uniform` is a number in [0, 1) and decides which id is drawn.
        """
        assert len(logits) == len(seen) == len(said) == len(self._tables[0])
        id: int = self._choose(logits, seen, said, self._choice, uniform, self._tables, self._rows)
        return id


@lru_cache(maxsize=1)
def compiled_choose() -> Any:
    """`choose` as machine code, from disk or made now: only where somebody samples."""
    machine_code: Any = native(choose, set())
    machine_code(*example())
    if machine_code.stats.cache_misses:
        seal()
    return machine_code


def example() -> tuple[Any, ...]:
    """Arguments of `choose` for a vocabulary of one."""
    one, (a, b, c) = np.zeros(1, np.float32), np.zeros((3, 1))
    seen, said = np.zeros(1, np.bool_), np.zeros(1, np.int32)
    tables = (np.zeros(1, np.int32), one.copy(), a, b, c)
    return one, seen, said, Choice(), 0.0, tables, (one.copy(), one[:0])
