"""Training: corpus → tokens → batches → training steps → a folder that `load` reads.

from glassllama.train import load_settings, train

train(load_settings("llama-tinyshakespeare-cpu", ["schedule.steps=500"]))
"""

import os
from typing import TYPE_CHECKING, Any

from glassllama.train.metrics import Listener, LoggedMetrics, NullListener, RunInfo, StepMetrics
from glassllama.train.settings import Settings, load_settings, preset_names

if TYPE_CHECKING:
    from glassllama.train.api import train

__all__ = [
    "Listener", "LoggedMetrics", "NullListener", "RunInfo", "Settings", "StepMetrics",
    "load_settings", "preset_names", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`train`, imported when it is first asked for: the rest needs no PyTorch."""
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # PyTorch's threads should sleep rather than spin: the fused loops between its products run in
    # other threads, and small steps end many parallel sections. Read when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from glassllama.train.api import train

    return train
