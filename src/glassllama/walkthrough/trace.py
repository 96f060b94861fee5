"""What a model computes on the way, kept by name; and the same run with something changed in it.

    logits, trace = run_with_trace(model, ids, watch=["layers.*.attention.weights"])
    trace["layers.3.attention.weights"]  # (B, H, T, S)

The running model itself is watched, with PyTorch's own hooks: there is no second model that could
drift. `nn.hooks.hook_names(model)` lists the names.

Shapes: B batch, T new tokens, S visible tokens, C model width, H query heads, D head width, V
vocabulary. Every place has the tokens on its last axis but one: (B, T, C), (B, H, T, D), (B, T, V).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glassllama.base.errors import GenerationError, GlassError, quoted
from glassllama.models.llama import Llama
from glassllama.nn.kv_cache import KVCache

TOKEN_AXIS = -2
# What keep_freed_memory tells glibc, by malloc.h's numbers: blocks up to 32 MiB (its limit) are
# no mappings of their own, and up to 2 GiB that are free at the end are not given back.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_MEMORY = ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, (1 << 31) - 1))
See = Callable[[str, Tensor], Tensor | None]  # a place, and what came out of it


class NotWatchedError(GlassError, KeyError):
    """The trace has nothing by this name."""

    __str__ = Exception.__str__  # a KeyError would show its text between quotes


class Trace(Mapping[str, Tensor]):
    """Place -> what came out of it, on the CPU, in the order in which the model computed it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, place: str) -> Tensor:
        if place not in self._tensors:
            raise NotWatchedError(f"trace: {place} was not watched (have {len(self)} places)")
        return self._tensors[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def matching(self, pattern: str) -> dict[str, Tensor]:
        """The places that match a pattern such as `layers.*.attention.heads`, in order."""
        return {name: self[name] for name in self if fnmatchcase(name, pattern)}

    @property
    def nbytes(self) -> int:
        """Memory held; what several places share counts once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.values()}
        return sum(storage.nbytes() for storage in storages.values())


@dataclass(frozen=True)
class Edit:
    """Replace what comes out of every place that matches a pattern: old tensor -> new one.

    The function gets the tensor that the model computed and must leave it as it is.
    """

    place: str
    function: Callable[[Tensor], Tensor]


@torch.no_grad()
def run_with_trace(
    model: Llama,
    ids: Tensor | Sequence[int],
    *,
    watch: Sequence[str] = ("*",),
    edits: Sequence[Edit] = (),
    cache: KVCache | None = None,
    positions: Sequence[int] | None = None,
) -> tuple[Tensor, Trace]:
    """Run the model on ids (T,) or (B, T) -> its logits (B, T, V), and what the watched places had.

    `watch` and `edits` name places by pattern. Edits come first: the trace holds what the model
    went on with. With `positions` only these of the T tokens are kept. While scores or weights of
    a layer are watched or edited, that layer computes attention by formula instead of in the fused
    kernel. Raises GlassError for a pattern that matches nothing, GenerationError for bad ids.
    """
    rows = checked_ids(model, ids)  # (B, T)
    kept: dict[str, Tensor] = {}
    chosen = None if positions is None else torch.tensor(list(positions), device=rows.device)

    def keep(place: str, out: Tensor) -> None:
        # An index copies, so that the unwanted rest is not held by a view.
        wanted = out if chosen is None else out.index_select(TOKEN_AXIS, chosen)
        kept[place] = wanted if wanted.is_cpu else wanted.cpu()

    sights: list[tuple[str, See]] = [(edit.place, partial(edited, edit)) for edit in edits]
    with looking(model, [*sights, *((pattern, keep) for pattern in watch)]):
        logits: Tensor = model(rows, cache)
    return logits, Trace(kept)


def keep_freed_memory() -> None:
    """From now on this process keeps what a pass has freed, up to 2 GiB, for the next pass.

    Otherwise it goes back to the system and comes again page by page, which is most of what
    watching costs (docs/log.md). Where the C library is not glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in KEPT_MEMORY:
            mallopt(option, value)


@contextmanager
def looking(model: nn.Module, sights: Sequence[tuple[str, See]]) -> Iterator[None]:
    """While inside, `see(place, out)` is called for all places that match the pattern beside it.

    What it returns, if anything, replaces `out`. Earlier sights come first.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    handles: list[RemovableHandle] = []
    try:
        for pattern, see in sights:
            for place in matching(modules, pattern):
                handles.append(modules[place].register_forward_hook(hook(place, see)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def matching(modules: Mapping[str, nn.Module], pattern: str) -> list[str]:
    if pattern in modules:
        return [pattern]
    found = [place for place in modules if fnmatchcase(place, pattern)]
    if not found:
        raise GlassError(f"nothing to watch is called {quoted(pattern)} (see nn.hooks.hook_names)")
    return found


def hook(place: str, see: See) -> Callable[[nn.Module, Any, Any], Tensor | None]:
    """As PyTorch calls it, with the module and what went in; caches come out of some, too."""

    def seen(_module: nn.Module, _in: Any, out: Any) -> Tensor | None:
        return see(place, out) if isinstance(out, Tensor) else None

    return seen


def edited(edit: Edit, place: str, out: Tensor) -> Tensor:
    new = edit.function(out)
    if new.shape != out.shape:
        raise GlassError(
            f"edit of {place}: expected a tensor of shape {tuple(out.shape)}, got "
            f"{tuple(new.shape)}"
        )
    return new


def checked_ids(model: Llama, ids: Tensor | Sequence[int]) -> Tensor:
    """(T,) or (B, T) -> (B, T) on the model's device."""
    rows = torch.as_tensor(ids, device=model.tok_embeddings.weight.device)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.numel() or rows.is_floating_point():
        raise GenerationError(f"ids must be (T,) or (B, T) whole numbers, got {rows.shape}")
    lowest, highest, size = int(rows.min()), int(rows.max()), model.config.vocab_size
    if lowest < 0 or highest >= size:
        bad = lowest if lowest < 0 else highest
        raise GenerationError(f"id {bad} is outside the vocabulary 0 … {size - 1}")
    return rows


def first_non_finite(trace: Trace) -> str | None:
    """The first place, in the order of computation, that holds NaN or an infinity."""
    return next((place for place, tensor in trace.items() if not tensor.isfinite().all()), None)
