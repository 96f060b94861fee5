"""From settings to a model with random weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast, get_type_hints

import torch
from torch import nn

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.language_model import LanguageModel
from glassllama.models.llama import Llama
from glassllama.nn.dropout import add_dropout
from glassllama.train.resolve import WORDS, fits, shown
from glassllama.train.settings import Settings
from glassllama.weights.load import torch_device

MODELS: dict[str, tuple[Any, Any]] = {
    "bigram": (BigramConfig, Bigram),
    "gpt": (GPTConfig, GPT),
    "llama": (LlamaConfig, Llama),
}
GIVEN = ("vocab_size", "max_seq_len")  # by the tokenizer, and by data.context
NOT_LEARNT = ("rope_scaling", "rope_layout")  # of other people's checkpoints


def make_model(settings: Settings, vocab_size: int) -> LanguageModel:
    """A new model on `run.device`, its weights drawn from `run.seed`, in float32.

    Raises ConfigError as `new_model` does.
    """
    model = new_model(settings, vocab_size)
    require_device(settings.run.device)
    model.initialise(torch.Generator().manual_seed(settings.run.seed))
    return cast(LanguageModel, as_module(model).to(settings.run.device))


def new_model(settings: Settings, vocab_size: int) -> LanguageModel:
    """A model whose weights mean nothing yet, on PyTorch's default device.

    Raises ConfigError naming `model.field`: unknown, missing, or a size that cannot be.
    """
    kind, (config_class, model_class) = settings.model.kind, MODELS[settings.model.kind]
    known = [f.name for f in fields(config_class) if f.name not in (*GIVEN, *NOT_LEARNT)]
    for name in settings.model.sizes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"have {', '.join(known)}"
            if not known:
                hint = "there are no sizes to choose, leave it out"
            raise ConfigError(f"model.{name}: a {kind} has no such setting; {hint}")
    require_kinds(config_class, settings.model.sizes)
    given = dict(zip(GIVEN, (vocab_size, settings.data.context), strict=True))
    try:
        config = config_class(**settings.model.sizes, **given)
    except TypeError:  # a field without default was left out
        missing = [name for name in known if name not in settings.model.sizes]
        raise ConfigError(f"model: a {kind} also needs {', '.join(missing)}") from None
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None
    model = model_class(config)
    add_dropout(model, settings.model.dropout)
    return cast(LanguageModel, model)


def require_kinds(config_class: type, sizes: Mapping[str, object]) -> None:
    """Raise ConfigError where a number, a text or a switch is given as something else."""
    hints = get_type_hints(config_class)
    for name, value in sizes.items():
        if hints[name] in WORDS and not fits(value, hints[name]):
            raise ConfigError(f"model.{name}: want {WORDS[hints[name]]}, got {shown(value)}")


def require_device(name: str) -> None:
    """Raise ConfigError where PyTorch knows no such device, or this machine has none."""
    torch_device(name, "run.device")


def parameters(model: LanguageModel) -> int:
    """How many numbers are learnt; those used twice count once."""
    return sum(p.numel() for p in as_module(model).parameters())


def as_module(model: LanguageModel) -> nn.Module:
    """The same object, seen as the PyTorch module that it is."""
    return cast(nn.Module, model)
