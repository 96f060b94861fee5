"""Tolerances: how much two correct computations may differ, from the rounding of their arithmetic.

Every floating-point comparison of the tests uses a tolerance of this file, or derives it in place.
Three kinds of comparison are exact: the same compiled code in the same strict order (the engine:
alone, in a batch, in chunks), copies of numbers, and ids or text.

The unit roundoff u of a number format is half the distance from 1 to the next number: 2⁻²⁴ for
float32, 2⁻⁸ for bfloat16. Source of the analysis: N. Higham, Accuracy and Stability of Numerical
Algorithms (2002), chapters 3 and 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

STAGES = 10  # successive operations of a layer whose results are rounded: see logits_tolerance
CONDITION = 4.0  # factor by which the layers enlarge an error of their input: see logits_tolerance


def unit(dtype: torch.dtype = torch.float32) -> float:
    """u, the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def wide(values: Any) -> NDArray[np.float64]:
    """A tensor, an array or numbers, in float64."""
    if isinstance(values, torch.Tensor):
        return values.detach().double().numpy()
    return np.asarray(values, np.float64)


def difference(ours: Any, reference: Any) -> float:
    """The largest difference of two arrays, relative to the largest number of the reference."""
    one, other = wide(ours), wide(reference)
    assert one.shape == other.shape
    if one.size == 0:
        return 0.0
    return float(np.abs(one - other).max() / np.abs(other).max())


def sum_bound(terms: int, sizes: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The maximum absolute error of a sum of products, for any order of summation.

    n products and n - 1 additions, each with a relative error of u, have an error of at most
    n·u·Σ|aᵢ·bᵢ| (Higham, section 3.1), and of more than 6·√n·u·Σ|aᵢ·bᵢ| with a probability below
    10⁻⁴ (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019). `sizes`
    are these Σ|aᵢ·bᵢ|, an array or one number, and `terms` is n. Two computations differ by at most
    twice that.
    """
    return min(terms, 6 * math.sqrt(terms)) * unit(dtype) * wide(sizes)


def logits_tolerance(
    config: Any, dtype: torch.dtype = torch.float32, layers: int | None = None
) -> float:
    """The maximum difference of two computations of logits, relative to the largest logit.

    - The error of a sum of n terms, in the blocks and vector registers of any library, is about
      u·log₂ n of its size: pairwise summation has that bound, and n is the width of the widest sum.
    - A layer has ten such results in succession: norm, q·k·v, rotation, scores, softmax, weighted
      sum, output; norm, gate and up, down. Their errors are independent of each other, so L layers
      add up to √(10·L) of one.
    - Layers enlarge an error of their input: a softmax multiplies it by the size of its scores, a
      norm divides it by what remains of terms that cancel. With weights of normal size the factor
      is below 4, for the largest of many thousand logits.

    test_tolerances.py compares float32 with float64: random models use 5 to 50 % of this tolerance.
    `layers`: the number of layers that have run, if not all. Numbers stored in a narrower dtype are
    summed in float32 by every library, so each sum is rounded once instead of log₂ n times.
    """
    widest = max(config.dim, config.ffn_dim)
    depth = STAGES * max(1, config.n_layers if layers is None else layers)
    each = math.log2(widest) if dtype == torch.float32 else 1.0
    return CONDITION * unit(dtype) * each * math.sqrt(depth)


def assert_logits(ours: Any, reference: Any, config: Any, *, layers: int | None = None) -> float:
    """Fail if logits, or hidden states, differ by more than float32 rounding -> the difference."""
    apart, bar = difference(ours, reference), logits_tolerance(config, layers=layers)
    assert apart <= bar, f"{apart:.2e} of the largest number, {bar:.2e} is the tolerance"
    return apart


def float64_logits(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function for the model's logits in float64, including the parts that use float32."""
    double = copy.deepcopy(model).double()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), patch.object(torch.Tensor, "float", torch.Tensor.double):
            return double(ids)

    return logits


def count_near_ties(logits: NDArray[Any], ids: Sequence[int], bar: float) -> int:
    """The number of `ids` that are not the most likely of their row of logits (T, V), but a near
    tie.

    Two logits with an error of `bar` × the largest may change places if they are closer than twice
    that. Fails at an id with a larger difference from the most likely.
    """
    found = 0
    for place, (row, id) in enumerate(zip(wide(logits), ids, strict=True)):
        gap, tie = row.max() - row[id], 2 * bar * np.abs(row[np.isfinite(row)]).max()
        assert gap <= tie, (
            f"id {id} at {place}: {gap:.2e} below the most likely, a tie is {tie:.2e}"
        )
        found += bool(gap > 0)
    return found


def assert_same_greedy(
    ours: Sequence[int],
    theirs: Sequence[int],
    prompt: Sequence[int],
    all_logits: Callable[[list[int]], NDArray[Any]],
    bar: float,
) -> None:
    """Two greedy continuations are the same, at least up to a near tie (see `count_near_ties`).

    `all_logits` (T,) -> (T, V) is called only for the first difference; after it the texts differ.
    """
    assert len(ours) == len(theirs) > 0
    for place, pair in enumerate(zip(ours, theirs, strict=True)):
        if pair[0] != pair[1]:
            row = wide(all_logits([*prompt, *ours[:place]])[-1:])
            for id in pair:
                count_near_ties(row, [id], bar)
            return


def rms_difference(ours: Any, reference: Any) -> float:
    """The root mean square difference, relative to the reference's standard deviation."""
    one, other = wide(ours), wide(reference)
    return float(np.sqrt(np.mean((one - other) ** 2)) / other.std())


def eight_bit_tolerance(layers: int) -> float:
    """`rms_difference` of two computations whose products have eight-bit inputs.

    A block of 32 numbers is rounded to steps of (largest)/127; the largest of 32 normal numbers is
    about 2.1σ, so a step is 2.1σ/127 and the rounding error step/√12: 0.5 % of σ. Four successive
    products of a layer have such inputs, so L layers add up to 0.5 % · √(4·L), and twice that
    because layers enlarge errors. Two computations whose float32 sums round differently select
    another step for some numbers, and so differ by less.
    """
    return 2 * 2.1 / 127 / math.sqrt(12) * math.sqrt(4 * layers)


def eight_bit_error(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """`rms_difference` of a model's logits if the inputs of its matrices are rounded like that.

    Measured with the model, because layers of different models enlarge an error differently. Other
    ways to round inputs to eight bits, or more, may have 1.5 times this error.
    """

    def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        blocks = inputs[0].unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((blocks / step).round() * step).flatten(-2)

    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        right = model(ids)
        hooks = [module.register_forward_pre_hook(rounded) for module in linear]
        error = rms_difference(model(ids), right)
    for hook in hooks:
        hook.remove()
    return error


def loss_tolerance(
    config: Any, *, steps: int, tokens: int = 1, dtype: torch.dtype = torch.float32
) -> float:
    """The maximum relative difference of the losses of two runs after so many steps.

    The first loss is the mean over `tokens` of errors like those of logits, which are independent,
    so its error is 1/√tokens of one. Each step adds an independent error to the weights: √steps.
    """
    return logits_tolerance(config, dtype) * math.sqrt(max(1, steps) / tokens)


def muon_tolerance(config: Any, *, steps: int) -> float:
    """The same for float32 runs after steps of Muon.

    Its products are in bfloat16. Two runs with a relative difference e round a share e/u of all
    numbers to another bfloat16 number, with an error of 2u: √(e/u)·u = √(e·u) is the mean error.
    """
    each = loss_tolerance(config, steps=steps)
    return CONDITION * math.sqrt(each * unit(torch.bfloat16))
