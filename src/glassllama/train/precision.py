"""In which numbers a model is trained, and by whose code: what `run.precision` and `.compile` mean.

Weights, optimisers and everything that is added up stay float32; `precision` is that of matrix
products. "auto" is bfloat16 where the device has instructions for it, else float32. A Llama on a
CPU is computed by native/training/blocks.py, everything else by PyTorch, with its autocast for
bfloat16.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext

import torch

from glassllama.models.language_model import LanguageModel
from glassllama.models.llama import Llama
from glassllama.native.training.blocks import FusedBlock, accelerate
from glassllama.train.faults import TrainingError
from glassllama.train.mfu import dtype_of
from glassllama.train.model_factory import as_module
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
    elif on_cpu and isinstance(model, Llama):
        accelerate(model, dropout, dtype_of(run.precision, run.device))


def arithmetic(model: LanguageModel, run: RunSettings) -> AbstractContextManager[object]:
    """Within, the model's matrix products are in `run.precision`."""
    fast = isinstance(model, Llama) and isinstance(model.layers[0], FusedBlock)
    if fast or dtype_of(run.precision, run.device) == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, torch.bfloat16)
