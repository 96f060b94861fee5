"""How far apart two right computations may be: bounds from the rounding of their own arithmetic.

Every floating-point comparison of the tests takes its bar from here, or derives it where it stands.
Three kinds of comparison need none, and are exact: the same compiled code in the same strict order
(the engine: alone, in a batch, in pieces), copies of numbers, and ids or text.

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

STAGES = 10  # operations of a layer whose results are rounded, one after another: see logits_bar
CONDITION = 4.0  # how much the layers enlarge an error that came into them: see logits_bar


def unit(dtype: torch.dtype = torch.float32) -> float:
    """u, the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def wide(values: Any) -> NDArray[np.float64]:
    """A tensor, an array or numbers, in float64."""
    if isinstance(values, torch.Tensor):
        return values.detach().double().numpy()
    return np.asarray(values, np.float64)


def difference(ours: Any, reference: Any) -> float:
    """The largest difference of two arrays, as a share of the largest number of the reference."""
    one, other = wide(ours), wide(reference)
    assert one.shape == other.shape
    if one.size == 0:
        return 0.0
    return float(np.abs(one - other).max() / np.abs(other).max())


def sum_bound(terms: int, sizes: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The most by which a sum of products can be off, absolute; holds for any order of summation.

    n products and n - 1 additions, each off by a share u, are off by at most n·u·Σ|aᵢ·bᵢ| (Higham,
    section 3.1), and by more than 6·√n·u·Σ|aᵢ·bᵢ| with a chance below 10⁻⁴ (Higham and Mary, A New
    Approach to Probabilistic Rounding Error Analysis, 2019). `sizes` are these Σ|aᵢ·bᵢ|, an array
    or one number, and `terms` is n. Two computations differ by no more than twice that.
    """
    return min(terms, 6 * math.sqrt(terms)) * unit(dtype) * wide(sizes)


def logits_bar(config: Any, dtype: torch.dtype = torch.float32, layers: int | None = None) -> float:
    """How much two computations of a model's logits may differ, as a share of the largest logit.

    - A sum of n terms, in the blocks and vector registers of any library, errs by about u·log₂ n
      of its size: pairwise summation has that bound, and n is the width of the widest sum.
    - A layer has ten such results one after another: norm, q·k·v, rotation, scores, softmax,
      weighted sum, output; norm, gate and up, down. Their errors are independent of each other, so
      L layers add up to √(10·L) of one.
    - An error that comes in leaves larger: a softmax multiplies by the size of its scores, a norm
      divides by what is left of terms that cancel. With weights of ordinary size the factor is
      below 4, for the largest of many thousand logits.

    test_tolerances.py holds float32 against float64: random models use 5 to 50 % of this bar.
    `layers`: where only some have run. Numbers kept in a narrower dtype are summed in float32 by
    every library, so that each sum is rounded once instead of log₂ n times.
    """
    widest = max(config.dim, config.ffn_dim)
    depth = STAGES * max(1, config.n_layers if layers is None else layers)
    each = math.log2(widest) if dtype == torch.float32 else 1.0
    return CONDITION * unit(dtype) * each * math.sqrt(depth)


def assert_logits(ours: Any, reference: Any, config: Any, *, layers: int | None = None) -> float:
    """Fail where logits, or hidden states, differ by more than float32 explains -> by how much."""
    apart, bar = difference(ours, reference), logits_bar(config, layers=layers)
    assert apart <= bar, f"{apart:.2e} of the largest number, {bar:.2e} is what rounding explains"
    return apart


def widened(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's logits without rounding to speak of: its float32 islands are widened as well."""
    double = copy.deepcopy(model).double()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), patch.object(torch.Tensor, "float", torch.Tensor.double):
            return double(ids)

    return logits


def ties(logits: NDArray[Any], ids: Sequence[int], bar: float) -> int:
    """How many of `ids` are not the likeliest of their row of logits (T, V), but a near tie.

    Two logits that are each off by `bar` × the largest may change places if they are closer than
    twice that. Fails at an id that is further from the likeliest.
    """
    found = 0
    for place, (row, id) in enumerate(zip(wide(logits), ids, strict=True)):
        gap, tie = row.max() - row[id], 2 * bar * np.abs(row[np.isfinite(row)]).max()
        assert gap <= tie, f"id {id} at {place}: {gap:.2e} below the likeliest, a tie is {tie:.2e}"
        found += bool(gap > 0)
    return found


def assert_same_greedy(
    ours: Sequence[int],
    theirs: Sequence[int],
    prompt: Sequence[int],
    all_logits: Callable[[list[int]], NDArray[Any]],
    bar: float,
) -> None:
    """Two greedy continuations are the same, at least up to a near tie (see `ties`).

    `all_logits` (T,) -> (T, V) is asked only where they part; behind that place the texts differ.
    """
    assert len(ours) == len(theirs) > 0
    for place, pair in enumerate(zip(ours, theirs, strict=True)):
        if pair[0] != pair[1]:
            row = wide(all_logits([*prompt, *ours[:place]])[-1:])
            for id in pair:
                ties(row, [id], bar)
            return


def spread_apart(ours: Any, reference: Any) -> float:
    """The root mean square difference, as a share of the reference's standard deviation."""
    one, other = wide(ours), wide(reference)
    return float(np.sqrt(np.mean((one - other) ** 2)) / other.std())


def eight_bit_bar(layers: int) -> float:
    """`spread_apart` of two computations whose products read eight-bit inputs.

    A block of 32 numbers is rounded to steps of (largest)/127; the largest of 32 normal numbers is
    about 2.1σ, a step 2.1σ/127, and rounding to steps errs by step/√12: 0.5 % of σ. Four products
    of a layer, one after another, read such numbers, so that L layers add up to 0.5 % · √(4·L),
    and twice that where layers enlarge an error. Two computations whose float32 sums round
    differently take another step for some numbers, and so differ by less.
    """
    return 2 * 2.1 / 127 / math.sqrt(12) * math.sqrt(4 * layers)


def eight_bit_error(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """`spread_apart` of a model's logits when the inputs of its matrices are rounded like that.

    Measured on the model itself, since what its layers make of an error is its own. Whatever else
    rounds inputs to eight bits, or better, may err by half as much again.
    """

    def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        blocks = inputs[0].unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((blocks / step).round() * step).flatten(-2)

    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        right = model(ids)
        hooks = [module.register_forward_pre_hook(rounded) for module in linear]
        error = spread_apart(model(ids), right)
    for hook in hooks:
        hook.remove()
    return error


def loss_bar(
    config: Any, *, steps: int, tokens: int = 1, dtype: torch.dtype = torch.float32
) -> float:
    """How much the losses of two runs may differ after so many steps, as a share of the loss.

    The first loss: the mean over `tokens` of errors like those of logits (which are independent,
    so it errs by 1/√tokens of one). Each step adds an error of its own to the weights, independent
    of those before: √steps.
    """
    return logits_bar(config, dtype) * math.sqrt(max(1, steps) / tokens)


def muon_bar(config: Any, *, steps: int) -> float:
    """The same for float32 runs whose steps are made by Muon, after the first.

    Its products are in bfloat16. Two runs apart by a share e take another bfloat16 number for a
    share e/u of all numbers, and are then off by 2u there: √(e/u)·u = √(e·u) is the mean error.
    """
    each = loss_bar(config, steps=steps)
    return CONDITION * math.sqrt(each * unit(torch.bfloat16))
