"""From settings to a model with random weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, cast, get_type_hints

import torch
from torch import nn

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError, quoted
from glassllama.base.fields import Fields
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.language_model import LanguageModel
from glassllama.models.llama import Llama
from glassllama.nn.dropout import add_dropout
from glassllama.nn.init import shapes_only
from glassllama.train.resolve import quoted_key, typed
from glassllama.train.settings import Settings
from glassllama.weights.load import torch_device

MODELS: dict[str, tuple[Any, Any]] = {
    "bigram": (BigramConfig, Bigram),
    "gpt": (GPTConfig, GPT),
    "llama": (LlamaConfig, Llama),
}
GIVEN = "max_seq_len"  # by data.context
LARGEST_SIZE, MOST_LAYERS = 1 << 20, 1000  # beyond any model: what is larger is a mistake
NOT_LEARNT = ("rope_scaling", "rope_layout")  # of other people's checkpoints


def make_model(settings: Settings, vocab_size: int) -> LanguageModel:
    """A new model on `run.device`, its weights drawn from `run.seed`, in float32.

    Raises ConfigError as `new_model` does.
    """
    model = new_model(settings, vocab_size)
    require_device(settings.run.device)
    model.initialize(torch.Generator().manual_seed(settings.run.seed))
    return cast(LanguageModel, as_module(model).to(settings.run.device))


def new_model(settings: Settings, vocab_size: int) -> LanguageModel:
    """A model whose weights mean nothing yet, on PyTorch's default device.

    Raises ConfigError as `new_config` does.
    """
    model = MODELS[settings.model.kind][1](new_config(settings, vocab_size))
    add_dropout(model, settings.model.dropout)
    return cast(LanguageModel, model)


def new_config(settings: Settings, vocab_size: int) -> Any:
    """The model's configuration. Raises ConfigError naming `model.field`: unknown, missing, or a
    size that cannot be."""
    kind, config_class = settings.model.kind, MODELS[settings.model.kind][0]
    known = [f.name for f in fields(config_class) if f.name not in (GIVEN, *NOT_LEARNT)]
    for name in settings.model.sizes:
        if name not in known:
            close = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"have {', '.join(known)}"
            raise ConfigError(f"model.{quoted_key(name)}: a {kind} has no such setting; {hint}")
    sizes = checked_sizes(settings, get_type_hints(config_class))
    sizes["vocab_size"] = rows = vocabulary_rows(settings, vocab_size)
    if rows < vocab_size:
        raise ConfigError(f"model.vocab_size: {rows}, but the tokenizer has {vocab_size} tokens")
    try:
        return config_class(**sizes, max_seq_len=settings.data.context)
    except TypeError:  # a field without default was left out
        missing = [name for name in known if name not in sizes]
        raise ConfigError(f"model: a {kind} also needs {', '.join(missing)}") from None
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None


def vocabulary_rows(settings: Settings, vocab_size: int) -> int:
    """Rows of the embeddings: `model.vocab_size`, or one for each token of the tokenizer."""
    return int(settings.model.sizes.get("vocab_size", vocab_size))


def checked_sizes(settings: Settings, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes, each of its kind and possible. Raises ConfigError: not a number, text, too large.

    Nothing is made by these numbers yet: a model of them may need any amount of memory.
    """
    sizes = settings.model.sizes
    get = Fields(settings.name, {f"model.{name}": value for name, value in sizes.items()})
    checked: dict[str, Any] = {}
    for name in sizes:
        if hints[name] is int:
            most = MOST_LAYERS if name == "n_layers" else LARGEST_SIZE
            checked[name] = get.whole(f"model.{name}", most=most)
        else:
            checked[name] = typed(get, f"model.{name}", hints[name])
    return checked


def require_device(name: str) -> None:
    """Raise ConfigError where PyTorch knows no such device, or this machine has none."""
    if torch_device(name, "run.device").type == "cpu" != name:
        raise ConfigError(f"run.device: want cpu without a number, got {quoted(name)}")


def numbers_of(settings: Settings, vocab_size: int) -> int:
    """How many numbers such a model has, found without making all of its layers.

    Raises ConfigError as `new_config` does.
    """
    layers = getattr(new_config(settings, vocab_size), "n_layers", None)

    def of(count: int | None) -> int:
        sizes = {**settings.model.sizes, **({} if count is None else {"n_layers": count})}
        some = replace(settings, model=replace(settings.model, sizes=sizes))
        with shapes_only():
            return parameters(new_model(some, vocab_size))

    return of(None) if layers is None else of(1) + (layers - 1) * (of(2) - of(1))


def parameters(model: LanguageModel) -> int:
    """How many numbers are learnt; those used twice count once."""
    return sum(p.numel() for p in as_module(model).parameters())


def as_module(model: LanguageModel) -> nn.Module:
    """The same object, seen as the PyTorch module that it is."""
    return cast(nn.Module, model)
