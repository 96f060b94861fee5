"""Hook points: names for the intermediate tensors of a model, for PyTorch's forward hooks.

Every module of a model has a name (`layers.3.attention.wq`, `layers.3.ffn_norm`). Where an
intermediate tensor is not the output of a module, a `HookPoint` makes it one: an identity with a
name, such as `layers.3.attention.weights`. Without a hook it costs one empty call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from glassllama.base.errors import GlassError, quoted


class HookPoint(nn.Module):
    """Returns its input. A forward hook can read the tensor, or return another one."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def is_hooked(self) -> bool:
        """Whether it has a hook. Then the formula is computed, so that the intermediate exists."""
        return bool(self._forward_hooks)


def hook_names(model: nn.Module) -> list[str]:
    """The names that hooks can be registered for: every module but the model itself."""
    return [name for name, _ in model.named_modules() if name]


@contextmanager
def recording(model: nn.Module, *patterns: str) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of all modules whose names match, such as `layers.*.attention.q`.

    Yields a dict that a forward pass inside the `with` fills: name -> tensor, detached, not copied;
    a later call replaces it. Raises GlassError if a pattern matches nothing, because a misspelt
    name would otherwise record nothing.
    """
    wanted = {name: module for name, module in model.named_modules() if name}
    kept: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for pattern in patterns:
            matches = [name for name in wanted if fnmatchcase(name, pattern)]
            if not matches:
                raise GlassError(
                    f"nothing to watch is called {quoted(pattern)} (see nn.hooks.hook_names)"
                )
            for name in matches:

                def keep(_m: nn.Module, _in: Any, out: Any, name: str = name) -> None:
                    if isinstance(out, Tensor):
                        kept[name] = out.detach()

                hooks.callback(wanted[name].register_forward_hook(keep).remove)
        yield kept
