"""What arithmetic this machine has, and how much of it a training step uses (MFU)."""

from __future__ import annotations

import time
from typing import Any

import torch

from glassllama.models.language_model import LanguageModel
from glassllama.train.model_factory import as_module

# The matrix products that stand for the peak: rows of the smallest and the largest, how often each
# is tried, and how many seconds are long enough.
SMALLEST, LARGEST, TRIES, LONG_ENOUGH = 256, 8192, 5, 0.01
TABLES = ("tok_embeddings.weight", "pos_embeddings.weight")  # looked up, not multiplied


def product_dtype(device: str) -> torch.dtype:
    """In which dtype matrix products are fastest there: bfloat16 only where it is in hardware.

    Elsewhere PyTorch emulates it: on a processor with AVX2 alone it takes twenty times as long as
    float32. On Arm, oneDNN supports bfloat16 only where there are instructions for it.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu" and torch.backends.mkldnn.is_available():
        has = torch.cpu.get_capabilities()
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            has.get("architecture") != "x86_64" or has.get("avx512_bf16") or has.get("amx_bf16")
        )
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def dtype_of(precision: str, device: str) -> torch.dtype:
    """What `run.precision` means on that device."""
    return product_dtype(device) if precision == "auto" else getattr(torch, precision)


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


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """The most multiplications and additions per second that a large matrix product reaches."""
    most, rows, seconds = 0.0, SMALLEST, 0.0
    while rows <= LARGEST and seconds < LONG_ENOUGH:
        a = torch.ones(rows, rows, device=device, dtype=dtype)
        times = []
        for _ in range(TRIES):
            started = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - started)
        seconds = min(times)
        most, rows = max(most, 2.0 * rows**3 / seconds), 2 * rows
    return most
