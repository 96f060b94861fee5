"""In which numbers a model is trained, and by whose code: what `run.precision` and `.compile` mean.

Weights, optimisers and everything that is added up stay float32. With "bfloat16" matrix products
are in bfloat16: a Llama on a CPU by train/fast.py, everything else by PyTorch's autocast.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext

import torch

from glassllama.models.language_model import LanguageModel
from glassllama.models.llama import Llama
from glassllama.train.build import as_module
from glassllama.train.fast import FastLayer, accelerate
from glassllama.train.faults import TrainingError
from glassllama.train.settings import RunSettings

COMPILERS = ("c++", "g++", "clang++", "cl")  # one of which torch.compile needs on a CPU


def choose_arithmetic(model: LanguageModel, run: RunSettings, dropout: float) -> None:
    """Let the model compute as the settings say. Raises TrainingError: nothing to compile, or
    to compile with."""
    on_cpu = run.device == "cpu"
    if run.compile:
        if on_cpu and not any(map(shutil.which, COMPILERS)):
            raise TrainingError("run.compile: no C++ compiler here; set run.compile=false")
        layers = dict(as_module(model).named_children()).get("layers")
        if layers is None:
            raise TrainingError(
                "run.compile: this model has no layers to compile; set run.compile=false"
            )
        for layer in layers.children():
            layer.compile(dynamic=False)
    elif on_cpu and run.precision == "bfloat16" and isinstance(model, Llama):
        accelerate(model, dropout)


def arithmetic(model: LanguageModel, run: RunSettings) -> AbstractContextManager[object]:
    """Within, the model's matrix products are in `run.precision`."""
    fast = isinstance(model, Llama) and isinstance(model.layers[0], FastLayer)
    if run.precision == "float32" or fast:
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, torch.bfloat16)
