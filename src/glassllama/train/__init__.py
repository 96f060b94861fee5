"""Training: corpus → tokens → batches → training steps → a folder that `load` reads.

from glassllama.train import load_settings, train

train(load_settings("llama-tinyshakespeare-cpu", ["schedule.steps=500"]))
"""

from glassllama.train.api import train
from glassllama.train.metrics import Listener, LoggedMetrics, NullListener, RunInfo, StepMetrics
from glassllama.train.settings import Settings, load_settings, preset_names

__all__ = [
    "Listener",
    "LoggedMetrics",
    "NullListener",
    "RunInfo",
    "Settings",
    "StepMetrics",
    "load_settings",
    "preset_names",
    "train",
]
