"""A checkpoint → the PyTorch model: built without memory, then filled one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError, MemoryShortError, quoted
from glassllama.base.interfaces import Progress
from glassllama.base.machine import available_memory, gigabytes
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.llama import Llama
from glassllama.nn.init import shapes_only
from glassllama.weights.memory import plan
from glassllama.weights.open import Checkpoint

WORKING_MEMORY = 100_000_000  # activations and PyTorch's own needs beside weights and cache

Model = Llama | GPT | Bigram
MODELS: dict[type, Callable[[Any], Model]] = {
    LlamaConfig: Llama,
    GPTConfig: GPT,
    BigramConfig: Bigram,
}


def load_llama(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Llama:
    """`load_model` of a Llama. Raises ConfigError where it is another model."""
    assert isinstance(checkpoint.config, LlamaConfig)
    model = load_model(checkpoint, device=device, dtype=dtype, progress=progress)
    assert isinstance(model, Llama)
    return model


def load_model(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Model:
    """The reference model with this checkpoint's weights, on `device`, in evaluation mode.

    `dtype` None keeps bfloat16 files as they are and makes everything else float32. Peak memory is
    the model as kept plus its largest tensor. Raises MemoryShortError before it allocates.
    """
    kept = kept_dtype(checkpoint) if dtype is None else dtype
    if torch.device(device).type == "cpu":
        elements = sum(int(np.prod(checkpoint.info(ours).shape)) for ours in checkpoint.names)
        require_memory_for(checkpoint, kept, elements * kept.itemsize + WORKING_MEMORY)
    with shapes_only():
        model = MODELS[type(checkpoint.model_config)](checkpoint.model_config).to(kept)  # shapes
    for done, ours in enumerate(checkpoint.names, start=1):
        set_parameter(model, ours, as_tensor(checkpoint, ours, kept, torch.device(device)))
        checkpoint.release_pages(ours)
        if progress is not None:
            progress(done, len(checkpoint.names))
    return model.requires_grad_(False).eval()


def torch_device(name: str, field: str = "device") -> torch.device:
    """The device of that name. Raises ConfigError about `field` where this machine lacks it.

    PyTorch's own message about a device that it was not built for has 7,000 characters.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("shapes without numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):
        there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        raise ConfigError(
            f"{field}: {quoted(name)} cannot be used here; on this machine PyTorch has "
            f"{', '.join(there)}"
        ) from None
    return device


def require_memory_for(checkpoint: Checkpoint, kept: torch.dtype, needed: int) -> None:
    """Raise MemoryShortError where `needed` bytes are not free: with what the planner advises."""
    free = available_memory()
    if free is None or needed <= free:
        return
    advice = "use a smaller model"
    if isinstance(checkpoint.model_config, LlamaConfig):  # others are neither packed nor streamed
        advice = plan(checkpoint, tokens=1, memory=free).advice()
    raise MemoryShortError(
        f"{checkpoint.path.name} in {str(kept).removeprefix('torch.')} needs {gigabytes(needed)} "
        f"of memory, {gigabytes(free)} are free; {advice}"
    )


def kept_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 where the file's matrices are, else float32."""
    stored = checkpoint.info("tok_embeddings.weight").dtype
    return torch.bfloat16 if stored == "BF16" else torch.float32


def as_tensor(
    checkpoint: Checkpoint, ours: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One tensor of the file, as `dtype` on `device`; never a view of the file."""
    if checkpoint.info(ours).dtype == "BF16" and dtype == torch.bfloat16:
        bits = np.array(checkpoint.read(ours).view(np.uint16))  # numpy has no bfloat16 of its own
        return torch.from_numpy(bits).view(torch.bfloat16).to(device)
    return torch.from_numpy(checkpoint.float32(ours)).to(device=device, dtype=dtype)


def set_parameter(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Put one tensor where the model so far has only a shape."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, torch.nn.Parameter(tensor, requires_grad=False))
