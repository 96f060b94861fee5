"""Initial weights, the same for the same seed; and dropout, which training adds to a model.

Source: GPT-2 (Radford et al., 2019), section 2.3. Matrices are normal with standard deviation 0.02;
those that write into the residual stream, two per layer, are divided by √(2 · layers), so that
their sum does not grow with the depth. Norms are ones, biases zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from glassllama.base.errors import ConfigError

DEVIATION = 0.02
RANDOM_INITS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)  # by PyTorch's modules
RESIDUAL = ("wo.weight", "down.weight")  # write into the residual stream


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules created in this context are on the meta device: shapes without data or memory."""
    with torch.device("meta"), NoRandomInit():
        yield


class NoRandomInit(TorchFunctionMode):
    """Skips random initialization, which has no effect on the meta device.

    For `normal_` on that device PyTorch would import its compiler, which takes two seconds.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func in RANDOM_INITS:
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator, n_layers: int) -> None:
    """Fill all weights in the order of the model's parameters.

    The numbers are drawn on the generator's device, so with a CPU generator a model on a GPU gets
    the same numbers as on the CPU.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        deviation = DEVIATION / (math.sqrt(2 * n_layers) if name.endswith(RESIDUAL) else 1.0)
        numbers = torch.randn(weight.shape, generator=generator, device=generator.device)
        weight.copy_(numbers * deviation)


# --- dropout --------------------------------------------------------------------------------------


PARTS = ("attention", "feed_forward")  # the modules that add to the residual stream


def add_dropout(model: nn.Module, probability: float) -> None:
    """Add dropout with this probability to `model`; the other activations are scaled up.

    Call it once. It draws from PyTorch's default generator of the device. Raises ConfigError: no
    probability, or a model without layers.
    """
    if not 0.0 <= probability < 1.0:
        raise ConfigError(f"dropout must be at least 0 and less than 1, got {probability}")
    if probability == 0.0:
        return
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"dropout: a {type(model).__name__} has no layers")

    def drop_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        return (F.dropout(x, probability, training=layer.training), *rest)

    def drop_output(part: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return F.dropout(out, probability, training=part.training)

    layers[0].register_forward_pre_hook(drop_input)  # the embeddings
    for name, part in layers.named_modules():
        if name.rpartition(".")[2] in PARTS:
            part.register_forward_hook(drop_output)
