"""Looking inside a running model: named places, PyTorch's own hooks, no second model.

Every module of a model already has a name (`layers.3.attention.wq`, `layers.3.ffn_norm`). Where an
intermediate is not the output of a module, a `Watch` makes it one: an identity with a name, such as
`layers.3.attention.weights`. Unwatched, it is one empty call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from glassllama.base.errors import GlassError, quoted


class Watch(nn.Module):
    """Passes a tensor on unchanged; a forward hook may look at it, or return another one."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def watched(self) -> bool:
        """Whether anybody looks: then the textbook form is computed, so that there is something."""
        return bool(self._forward_hooks)


def places(model: nn.Module) -> list[str]:
    """The names that can be watched: every module but the model itself."""
    return [name for name, _ in model.named_modules() if name]


@contextmanager
def recording(model: nn.Module, *patterns: str) -> Iterator[dict[str, Tensor]]:
    """Keep the output of every place whose name matches a pattern such as `layers.*.attention.q`.

    Yields a dict that a forward pass inside the `with` fills, name -> tensor (detached, not
    copied; what a later call records replaces it). Raises GlassError where a pattern matches
    nothing, because a misspelt name would otherwise record silence.
    """
    wanted = {name: module for name, module in model.named_modules() if name}
    kept: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for pattern in patterns:
            matches = [name for name in wanted if fnmatchcase(name, pattern)]
            if not matches:
                raise GlassError(
                    f"nothing to watch is called {quoted(pattern)} (see nn.watch.places)"
                )
            for name in matches:

                def keep(_m: nn.Module, _in: Any, out: Any, name: str = name) -> None:
                    if isinstance(out, Tensor):
                        kept[name] = out.detach()

                hooks.callback(wanted[name].register_forward_hook(keep).remove)
        yield kept
