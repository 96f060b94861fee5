"""Which backend runs a model, and what cannot be asked of it: checked before anything is opened."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from glassllama.base.errors import ConfigError, quoted
from glassllama.base.interfaces import CacheType
from glassllama.weights.quantization import Quantize

Backend = Literal["auto", "engine", "torch"]
Dtype = Literal["float32", "bfloat16"]


def choose_backend(
    backend: Backend, device: str, dtype: str | None, stream_layers: bool = False
) -> Literal["engine", "torch"]:
    """Which executor; ConfigError where what was asked for cannot go together."""
    if backend not in ("auto", "engine", "torch"):
        raise ConfigError(f"backend must be auto, engine or torch, got {quoted(backend)}")
    if not isinstance(device, str) and not hasattr(device, "type"):  # torch.device has one
        raise ConfigError(f"device must be a name such as cpu or cuda:0, got {quoted(device)}")
    if backend == "engine" and stream_layers:
        raise ConfigError("--stream-layers is for the torch backend: leave it out, or the engine")
    needs_torch = device != "cpu" or dtype is not None
    if backend == "engine" and needs_torch:
        asked = f"device {quoted(device)}" if device != "cpu" else f"dtype {dtype}"
        raise ConfigError(f"the engine runs on the CPU in its own precision, not with {asked}")
    return "torch" if backend == "torch" or needs_torch or stream_layers else "engine"


def check_numbers(dtype: str | None, quantize: str | None, cache: str, threads: int | None) -> None:
    """ConfigError for a form of numbers that there is not, or threads that cannot be."""
    choices: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "dtype": (dtype, (None, *get_args(Dtype))),
        "quantize": (quantize, (None, *get_args(Quantize))),
        "cache": (cache, get_args(CacheType)),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(
                f"{name} must be {' or '.join(map(str, allowed))}, got {quoted(value)}"
            )
    whole = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
    if threads is not None and not (whole and threads > 0):
        raise ConfigError(
            "threads must be a whole number of at least 1, or None for every core, got "
            f"{quoted(threads)}"
        )


def check_precision(
    chosen: str,
    dtype: str | None,
    exact: bool,
    quantize: str | None,
    cache: str,
    stream_layers: bool = False,
) -> None:
    """ConfigError where two precisions are asked for, or one that the backend does not have."""
    torch = "--stream-layers" if stream_layers else "the torch backend"
    if exact and dtype == "bfloat16":
        raise ConfigError("exact arithmetic is float32: leave out dtype bfloat16")
    if chosen == "torch" and quantize not in (None, "none"):
        raise ConfigError(f"quantize {quantize} is for the engine, not for {torch}")
    if cache == "int8" and (exact or chosen == "torch"):
        why = "exact arithmetic keeps float32" if exact else f"{torch} has its own"
        raise ConfigError(f"cache int8 is for the engine: {why}")
