"""Data types of matrix products: `run.precision` and `run.compile`, and how fast products are here.

Weights, optimizer state and everything that is summed stay float32; `precision` is that of matrix
products. "auto" is bfloat16 if the device has instructions for it, else float32. On a CPU a Llama's
blocks are computed by native/training/blocks.py if it supports their layer plan, all other models
by PyTorch, with autocast for bfloat16. This is the only file of train/ that imports native/.
"""

from __future__ import annotations

import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from glassllama.base.errors import TrainingError
from glassllama.base.layer_plan import llama_plan
from glassllama.models.language_model import LanguageModel
from glassllama.models.llama import Llama
from glassllama.native.jit import code_cache
from glassllama.native.training.blocks import FusedBlock, can_fuse, fuse_blocks
from glassllama.train.model_factory import as_module
from glassllama.train.settings import RunSettings

COMPILERS = ("c++", "g++", "clang++", "cl")  # torch.compile needs one of these on a CPU
# Measuring the peak: rows of the smallest and the largest product, tries of each, and the seconds
# from which a product is large enough.
SMALLEST, LARGEST, TRIES, LONG_ENOUGH = 256, 8192, 5, 0.01
LOOKUPS = ("tok_embeddings.weight", "pos_embeddings.weight")  # read, not multiplied


def product_dtype(device: str) -> torch.dtype:
    """The dtype of the fastest matrix products: bfloat16 if the hardware has it, else float32.

    Elsewhere PyTorch emulates bfloat16: with AVX2 alone, 20 times slower than float32. On Arm,
    oneDNN supports bfloat16 only where there are instructions for it.
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


def dtype_of(run: RunSettings) -> torch.dtype:
    """The dtype that `run.precision` means on its device."""
    auto = run.precision == "auto"
    return product_dtype(run.device) if auto else getattr(torch, run.precision)


def set_precision(model: LanguageModel, run: RunSettings, dropout: float) -> None:
    """Compile the model's layers, or use fused blocks, as the settings say.

    Raises TrainingError: nothing to compile, or no compiler.
    """
    on_cpu = run.device == "cpu"
    if run.compile:
        if on_cpu and not any(map(shutil.which, COMPILERS)):
            raise TrainingError("run.compile: no C++ compiler found; set run.compile=false")
        layers = dict(as_module(model).named_children()).get("layers")
        if layers is None:
            raise TrainingError(
                "run.compile: this model has no layers to compile; set run.compile=false"
            )
        for layer in layers.children():
            layer.compile(dynamic=False)
    elif on_cpu and isinstance(model, Llama) and can_fuse(llama_plan(model.config)):
        fuse_blocks(model, dropout, dtype_of(run))


def autocast(model: LanguageModel, run: RunSettings) -> AbstractContextManager[object]:
    """Inside, the model's matrix products are in `run.precision`."""
    fused = isinstance(model, Llama) and isinstance(model.layers[0], FusedBlock)
    if fused or dtype_of(run) == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, torch.bfloat16)


def save_compiled_code() -> None:
    """Let other processes use what was compiled in this one; call it when all kernels have run."""
    code_cache.save_checksums()


def flops_per_token(model: LanguageModel, context: int) -> float:
    """Floating point operations per token of a training step; 0 for a model without layers.

    Source: PaLM (Chowdhery et al., 2022), appendix B: 6 per weight of a matrix, and for attention
    12 · layers · heads · head_dim · context.
    """
    config: Any = model.config
    layers = getattr(config, "n_layers", 0)
    named = as_module(model).named_parameters()
    weights = sum(p.numel() for name, p in named if p.ndim == 2 and name not in LOOKUPS)
    if layers and config.tie_embeddings:
        weights += config.vocab_size * config.dim  # the embeddings, as the output matrix
    attention = layers * config.n_heads * config.head_dim * context if layers else 0
    return 6.0 * weights + 12.0 * attention


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Floating point operations per second of a large matrix product, measured."""
    peak, rows, seconds = 0.0, SMALLEST, 0.0
    while rows <= LARGEST and seconds < LONG_ENOUGH:
        a = torch.ones(rows, rows, device=device, dtype=dtype)
        times = []
        for _ in range(TRIES):
            started = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - started)
        seconds = min(times)
        peak, rows = max(peak, 2.0 * rows**3 / seconds), 2 * rows
    return peak
