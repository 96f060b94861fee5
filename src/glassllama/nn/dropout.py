"""Dropout: while training, a share of the numbers is left out, so that no one can be relied upon.

Source: Srivastava et al., 2014; the places are GPT-2's: what the embeddings give, and what every
attention and feed-forward part adds. The models know nothing of it: dropout is hung onto them from
outside and acts only in training mode, so there is nothing of it in inference.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.base.errors import ConfigError

PARTS = ("attention", "feed_forward")  # what is added to the residual stream


def add_dropout(model: nn.Module, probability: float) -> None:
    """Let `model`, in training mode, drop numbers with this probability; the rest grow to match.

    Call it once. Draws from PyTorch's own generator of the device. Raises ConfigError: no
    probability, or a model without layers.
    """
    if not 0.0 <= probability < 1.0:
        raise ConfigError(f"dropout must be at least 0 and less than 1, got {probability}")
    if probability == 0.0:
        return
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"dropout: a {type(model).__name__} has no layers to drop from")

    def drop_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        return (F.dropout(x, probability, training=layer.training), *rest)

    def drop_output(part: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return F.dropout(out, probability, training=part.training)

    layers[0].register_forward_pre_hook(drop_input)  # the embeddings
    for name, part in layers.named_modules():
        if name.rpartition(".")[2] in PARTS:
            part.register_forward_hook(drop_output)
