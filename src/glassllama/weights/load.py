"""A checkpoint → the PyTorch model: built without memory, then filled one tensor at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from glassllama.base.errors import ConfigError, MemoryShortError, quoted
from glassllama.base.interfaces import Progress
from glassllama.base.machine import available_memory, gigabytes
from glassllama.models.language_model import LanguageModel
from glassllama.models.llama import Llama
from glassllama.nn.init import shapes_only
from glassllama.weights.checkpoint import Checkpoint
from glassllama.weights.memory import estimate_memory

WORKING_MEMORY = 100_000_000  # activations and PyTorch's own needs beside weights and cache


def load_llama(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Llama:
    """`load_model` for a Llama. Raises ConfigError for another architecture."""
    if checkpoint.architecture.name != "llama":
        raise ConfigError(
            f"{checkpoint.path}: expected a Llama, got a {checkpoint.architecture.title}"
        )
    model = load_model(checkpoint, device=device, dtype=dtype, progress=progress)
    assert isinstance(model, Llama)
    return model


def load_model(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """The reference model with this checkpoint's weights, on `device`, in evaluation mode.

    `dtype` None leaves bfloat16 files as they are and makes everything else float32. Peak memory is
    the model and its largest tensor. Raises MemoryShortError before it allocates.
    """
    dtype = default_dtype(checkpoint) if dtype is None else dtype
    if torch.device(device).type == "cpu":
        elements = sum(math.prod(checkpoint.info(ours).shape) for ours in checkpoint.names)
        require_free_memory(checkpoint, dtype, elements * dtype.itemsize + WORKING_MEMORY)
    with shapes_only():
        model: LanguageModel = checkpoint.architecture.model_class()(checkpoint.config).to(dtype)
    for done, ours in enumerate(checkpoint.names, start=1):
        set_parameter(model, ours, as_tensor(checkpoint, ours, dtype, torch.device(device)))
        checkpoint.release_pages(ours)
        if progress is not None:
            progress(done, len(checkpoint.names))
    return model.requires_grad_(False).eval()


def torch_device(name: str, field: str = "device") -> torch.device:
    """The device with this name. Raises ConfigError naming `field` if it is not available.

    PyTorch's own message about a device that it was not built for has 7,000 characters.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("shapes without data")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):
        there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        raise ConfigError(
            f"{field}: {quoted(name)} cannot be used here; on this machine PyTorch has "
            f"{', '.join(there)}"
        ) from None
    return device


def require_free_memory(checkpoint: Checkpoint, dtype: torch.dtype, needed: int) -> None:
    """Raise MemoryShortError with advice if fewer than `needed` bytes are free."""
    free = available_memory()
    if free is None or needed <= free:
        return
    advice = "use a smaller model"
    if checkpoint.architecture.layer_plan is not None:  # others are neither packed nor streamed
        advice = estimate_memory(checkpoint, tokens=1, memory=free).advice()
    raise MemoryShortError(
        f"{checkpoint.path.name} in {str(dtype).removeprefix('torch.')} needs {gigabytes(needed)} "
        f"of memory, {gigabytes(free)} are free; {advice}"
    )


def default_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 if the file's matrices are, else float32."""
    stored = checkpoint.info("tok_embeddings.weight").dtype
    return torch.bfloat16 if stored == "BF16" else torch.float32


def as_tensor(
    checkpoint: Checkpoint, ours: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One tensor as `dtype` on `device`; never a view of the file."""
    if checkpoint.info(ours).dtype == "BF16" and dtype == torch.bfloat16:
        bits = np.array(checkpoint.read(ours).view(np.uint16))  # NumPy has no bfloat16
        return torch.from_numpy(bits).view(torch.bfloat16).to(device)
    return torch.from_numpy(checkpoint.float32(ours)).to(device=device, dtype=dtype)


def set_parameter(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter, which may so far have been a shape without data."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, torch.nn.Parameter(tensor, requires_grad=False))
