"""Record the intermediate tensors of a running model by name, and change them on the way.

    result = trace(model, ids, hooks=["layers.*.attention.weights"])
    result["layers.3.attention.weights"]  # (B, H, T, S)
    result.logits  # (B, T, V)

It is the model itself that runs, with PyTorch's forward hooks; there is no second model that could
differ from it. docs/hooks.md lists the names of the hooks.

Shapes: B batch, T new tokens, S visible tokens, C model width, H query heads, D head width, V
vocabulary. In every recorded tensor the tokens are the last axis but one: (B, T, C), (B, H, T, D).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from glassllama.base.errors import GenerationError, GlassError
from glassllama.models.language_model import LanguageModel
from glassllama.nn.hooks import HookFn, add_hooks
from glassllama.nn.kv_cache import KVCache

TOKEN_AXIS = -2
# Options of glibc's mallopt, by malloc.h: blocks up to 32 MiB (its limit) are not mapped one by
# one, and up to 2 GiB of free memory at the end of the heap are not returned.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MALLOC_OPTIONS = ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, (1 << 31) - 1))


class NotRecordedError(GlassError, KeyError):
    """The trace has no tensor of this name."""

    __str__ = Exception.__str__  # a KeyError would show its text between quotes


class Trace(Mapping[str, Tensor]):
    """Name of a hook -> its tensor, on the CPU, in the order in which the model computed them.

    `ids` (B, T) are the tokens of the run, `logits` (B, T, V) its result on the model's device.
    """

    def __init__(self, tensors: Mapping[str, Tensor], ids: Tensor, logits: Tensor) -> None:
        self._tensors, self.ids, self.logits = dict(tensors), ids, logits

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise NotRecordedError(
                f"{name} was not recorded: the trace has {len(self)} other tensors; name it in "
                "`hooks`"
            )
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def matching(self, pattern: str) -> dict[str, Tensor]:
        """The tensors whose names match a pattern such as `layers.*.attention.heads`, in order."""
        return {name: self[name] for name in self if fnmatchcase(name, pattern)}

    @property
    def nbytes(self) -> int:
        """Memory of the tensors; what several names share counts once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.values()}
        return sum(storage.nbytes() for storage in storages.values())

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
            raise GlassError(
                f"intervention at {name}: expected a tensor of shape {tuple(out.shape)}, got "
                f"{tuple(new.shape)}"
            )
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
