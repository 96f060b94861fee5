"""How much of this machine's arithmetic a training step uses (MFU, model FLOPs utilisation)."""

from __future__ import annotations

import time
from typing import Any

import torch

from glassllama.models.language_model import LanguageModel
from glassllama.train.build import as_module

SIDE, TRIES = 1024, 5  # the matrix product that stands for the peak, and how often it is tried
TABLES = ("tok_embeddings.weight", "pos_embeddings.weight")  # looked up, not multiplied


def flops_per_token(model: LanguageModel, context: int) -> float:
    """Multiplications and additions of one token's part in a training step.

    Source: PaLM (Chowdhery et al., 2022), appendix B: 6 per weight of a matrix, and for attention
    12 · layers · heads · head_dim · context. 0 for a model without matrix products.
    """
    config: Any = model.config
    layers = getattr(config, "n_layers", 0)
    named = as_module(model).named_parameters()
    weights = sum(p.numel() for name, p in named if p.ndim == 2 and name not in TABLES)
    if layers and config.tie_embeddings:
        weights += config.vocab_size * config.dim  # the same table again, as the output
    attention = layers * config.n_heads * config.head_dim * context if layers else 0
    return 6.0 * weights + 12.0 * attention


def peak_flops(device: str, precision: str) -> float:
    """The most multiplications and additions per second that one large matrix product reaches."""
    a = torch.ones(SIDE, SIDE, device=device, dtype=getattr(torch, precision))
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2.0 * SIDE**3 / min(times)
