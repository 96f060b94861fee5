"""Record the intermediate tensors of a running model by name, change them, analyze them.

    result = trace(model, ids, hooks=["layers.*.attention.weights"])
    result["layers.3.attention.weights"]  # (B, H, T, S)
    result.logits  # (B, T, V)

It is the model itself that runs, with PyTorch's forward hooks; there is no second model that could
differ from it. docs/hooks.md lists the names of the hooks. The second half of the file analyzes
traces: logit lens, attention entropy, norms of the residual stream, divergence.

Shapes: B batch, T new tokens, S visible tokens, C model width, H query heads, D head width, V
vocabulary, L layers. In every recorded tensor the tokens are the last axis but one: (B, T, C),
(B, H, T, D).
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glassllama.base.errors import GenerationError, GlassError
from glassllama.models.language_model import LanguageModel
from glassllama.nn.hooks import HookFn, add_hooks
from glassllama.nn.kv_cache import KVCache

TOKEN_AXIS = -2
MOST_LOGITS = 1 << 25  # float32 numbers computed at a time: 128 MiB, and as many for the softmax
# Options of glibc's mallopt, by malloc.h: blocks up to 32 MiB (its limit) are not mapped one by
# one, and up to 2 GiB of free memory at the end of the heap are not returned.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MALLOC_OPTIONS = ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, (1 << 31) - 1))


class NotRecordedError(GlassError, KeyError):
    """The trace has no tensor of this name."""

    __str__ = Exception.__str__  # a KeyError would show its text between quotes


class Trace(dict[str, Tensor]):
    """Name of a hook -> its tensor, on the CPU, in the order in which the model computed them.

    `ids` (B, T) are the tokens of the run, `logits` (B, T, V) its result on the model's device.
    """

    def __init__(self, tensors: Mapping[str, Tensor], ids: Tensor, logits: Tensor) -> None:
        super().__init__(tensors)
        self.ids, self.logits = ids, logits

    def __missing__(self, name: str) -> Tensor:
        raise NotRecordedError(
            f"{name} was not recorded: the trace has {len(self)} other tensors; name it in `hooks`"
        )

    def matching(self, pattern: str) -> dict[str, Tensor]:
        """The tensors whose names match a pattern such as `layers.*.attention.heads`, in order."""
        return {name: self[name] for name in self if fnmatchcase(name, pattern)}

    def first_non_finite(self) -> str | None:
        """The first name, in the order of computation, whose tensor has NaN or infinities."""
        return next((name for name, tensor in self.items() if not tensor.isfinite().all()), None)


@dataclass(frozen=True)
class Intervention:
    """Replace the output of every hook that matches a pattern by function(output).

    The function must not change the tensor that it gets, and must return one of the same shape.
    """

    hook: str
    function: Callable[[Tensor], Tensor]

    def apply(self, name: str, out: Tensor) -> Tensor:
        new = self.function(out)
        if new.shape != out.shape:
            shapes = f"of shape {tuple(out.shape)}, got {tuple(new.shape)}"
            raise GlassError(f"intervention at {name}: expected a tensor {shapes}")
        return new


def ablate_head(layer: int, head: int) -> Intervention:
    """Set the output of one attention head to zero."""

    def without_head(heads: Tensor) -> Tensor:  # (B, H, T, D)
        if not 0 <= head < heads.shape[1]:
            raise GlassError(f"head {head} is out of range 0 … {heads.shape[1] - 1}")
        ablated = heads.clone()
        ablated[:, head] = 0
        return ablated

    return Intervention(f"layers.{layer}.attention.heads", without_head)


def patch(hook: str, source: Trace, positions: Sequence[int] | None = None) -> Intervention:
    """Activation patching: use the tensor of another run, for all or for some of the T tokens."""
    other = source[hook]

    def patched(out: Tensor) -> Tensor:
        if positions is None:
            return other.to(out)
        index = torch.tensor(list(positions), device=out.device)
        return out.index_copy(TOKEN_AXIS, index, other.to(out).index_select(TOKEN_AXIS, index))

    return Intervention(hook, patched)


@torch.no_grad()
def trace(
    model: LanguageModel,
    ids: Tensor | Sequence[int],
    *,
    hooks: Sequence[str] = ("*",),
    interventions: Sequence[Intervention] = (),
    cache: KVCache | None = None,
    positions: Sequence[int] | None = None,
) -> Trace:
    """Run the model on ids (T,) or (B, T) and record the outputs of `hooks` (names or patterns).

    Interventions come first: the trace has the tensors that the model continued with. With
    `positions` only these of the T tokens are recorded. While scores or weights of a layer are
    recorded or replaced, that layer computes attention by the formula instead of the fused kernel.
    Raises GlassError for a pattern that matches nothing, GenerationError for bad ids.
    """
    rows = batch_of_ids(model, ids)  # (B, T)
    recorded: dict[str, Tensor] = {}
    index = None if positions is None else torch.tensor(list(positions), device=rows.device)

    def record(name: str, out: Tensor) -> None:
        # index_select copies; a view would keep the memory of all tokens.
        tensor = out if index is None else out.index_select(TOKEN_AXIS, index)
        recorded[name] = tensor if tensor.is_cpu else tensor.cpu()

    functions: list[tuple[str, HookFn]] = [(each.hook, each.apply) for each in interventions]
    functions += [(pattern, record) for pattern in hooks]
    with add_hooks(model, functions):
        logits = model(rows, cache)
    return Trace(recorded, rows, logits)


def batch_of_ids(model: LanguageModel, ids: Tensor | Sequence[int]) -> Tensor:
    """(T,) or (B, T) -> (B, T) on the model's device. Raises GenerationError for other shapes."""
    rows = torch.as_tensor(ids, device=model.tok_embeddings.weight.device)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.numel() or rows.is_floating_point():
        raise GenerationError(
            f"ids must be integers of shape (T,) or (B, T), got {rows.dtype} {tuple(rows.shape)}"
        )
    lowest, highest, size = int(rows.min()), int(rows.max()), model.config.vocab_size
    if lowest < 0 or highest >= size:
        bad = lowest if lowest < 0 else highest
        raise GenerationError(f"id {bad} is outside the vocabulary 0 … {size - 1}")
    return rows


def retain_freed_memory() -> None:
    """Let this process reuse up to 2 GiB of memory that a forward pass has freed.

    By default glibc returns it to the system, and the next pass gets it back page by page, which
    is most of what recording costs (docs/log.md). No effect with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in MALLOC_OPTIONS:
            mallopt(option, value)


def residual_stream(trace: Trace) -> list[Tensor]:
    """The residual stream before the first and after each layer: L + 1 tensors (B, T, C).

    They must have been recorded, with `hooks=["*embeddings", "layers.*"]` for instance.
    """
    n_layers = sum(name.startswith("layers.") and name.count(".") == 1 for name in trace)
    first = "embeddings" if "embeddings" in trace else "tok_embeddings"  # GPT adds positions
    return [trace[name] for name in (first, *(f"layers.{n}" for n in range(n_layers)))]


def residual_norms(trace: Trace) -> Tensor:
    """L2 norm of each token's vector before the first and after each layer: (L + 1, B, T)."""
    return torch.stack([x.float().norm(dim=-1) for x in residual_stream(trace)])


def attention_entropy(weights: Tensor) -> Tensor:
    """Entropy of each row of attention weights, in bits: (B, H, T, S) -> (B, H, T).

    0 if one token has all the weight, log2(n) if n tokens have the same weight.
    """
    nats: Tensor = torch.special.entr(weights.float()).sum(-1)
    return nats / math.log(2)


def kl_divergence(logits: Tensor, other: Tensor) -> float:
    """Kullback-Leibler divergence of softmax(other) from softmax(logits), both (V,), in bits."""
    p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum().clamp(min=0)) / math.log(2)


class Predictions(NamedTuple):
    """The most probable next tokens, in descending order: `ids` and `probs`, both (…, k)."""

    ids: Tensor
    probs: Tensor


def predictions(logits: Tensor, k: int = 1) -> Predictions:
    """(…, V) -> the k most probable tokens after each position."""
    probs, ids = logits.float().softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return Predictions(ids, probs)


def predictions_by_row(logits: Tensor, k: int = 1) -> Predictions:
    """The same for (T, V), one row at a time: a copy of all logits could be large."""
    return Predictions(
        *map(torch.stack, zip(*(predictions(row, k) for row in logits), strict=True))
    )


@torch.no_grad()
def logit_lens(
    model: Any, trace: Trace, k: int = 5, positions: Sequence[int] | None = None
) -> Predictions:
    """Predictions from the residual stream before the first and after each layer: (L + 1, B, T, k).

    Each goes through the last norm and the output matrix, so the last of them is the model's own
    prediction. With `positions`, only after these of the T tokens. Source: "interpreting GPT: the
    logit lens" (nostalgebraist, 2020).
    """
    device = model.tok_embeddings.weight.device
    columns = slice(None) if positions is None else list(positions)
    xs = torch.stack([x[:, columns] for x in residual_stream(trace)])  # (L + 1, B, T, C)
    # Several layers at a time: a streamed model reads its output matrix once for each group.
    group = max(1, MOST_LOGITS // (xs[0, ..., 0].numel() * model.config.vocab_size))
    parts = [predictions(model.logits(model.norm(x.to(device))), k) for x in torch.split(xs, group)]
    ids, probs = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
    return Predictions(ids, probs)
