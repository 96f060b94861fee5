"""Hook points: names for the intermediate tensors of a model, and functions to call on them.

Every module of a model has a name (`layers.3.attention.wq`, `layers.3.ffn_norm`). Where an
intermediate tensor is not the output of a module, a `HookPoint` makes it one: an identity with a
name, such as `layers.3.attention.weights`. Without a hook it costs one empty call.
docs/hooks.md lists the names of every architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glassllama.base.errors import GlassError, quoted

# Called with the name of a module and its output. A tensor that it returns replaces the output.
HookFn = Callable[[str, Tensor], Tensor | None]


class HookPoint(nn.Module):
    """Returns its input. A forward hook can read the tensor, or return another one."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def is_hooked(self) -> bool:
        """Whether it has a hook. If so, the model computes this tensor without a fused kernel."""
        return bool(self._forward_hooks)


def hook_names(model: nn.Module) -> list[str]:
    """The names that hooks can be added to: every module but the model itself."""
    return [name for name, _ in model.named_modules() if name]


@contextmanager
def add_hooks(model: nn.Module, hooks: Sequence[tuple[str, HookFn]]) -> Iterator[None]:
    """Inside the `with`, call each function on the outputs of all modules that match its pattern.

    A pattern is a name, or has wildcards: `layers.*.attention.q`. If several functions match one
    module, they are called in order, each with the result of the previous one. Raises GlassError if
    a pattern matches nothing; a misspelled name would otherwise have no effect.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    handles: list[RemovableHandle] = []
    try:
        for pattern, function in hooks:
            for name in matching_names(modules, pattern):
                handles.append(modules[name].register_forward_hook(forward_hook(name, function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def matching_names(modules: Mapping[str, nn.Module], pattern: str) -> list[str]:
    if pattern in modules:
        return [pattern]
    names = [name for name in modules if fnmatchcase(name, pattern)]
    if not names:
        raise GlassError(f"no hook is called {quoted(pattern)}: docs/hooks.md lists the names")
    return names


def forward_hook(name: str, function: HookFn) -> Callable[[nn.Module, Any, Any], Tensor | None]:
    """`function` as a PyTorch forward hook. Outputs that are not tensors are left unchanged."""

    def hook(_module: nn.Module, _inputs: Any, out: Any) -> Tensor | None:
        return function(name, out) if isinstance(out, Tensor) else None

    return hook
