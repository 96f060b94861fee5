"""Dropout: during training a random share of the activations is set to zero.

Source: Srivastava et al., 2014. As in GPT-2 it is applied to the embeddings and to the outputs of
all attention and feed-forward modules. It is added to a model by hooks and acts in training mode
only, so that the models and inference need no code for it.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.base.errors import ConfigError

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
