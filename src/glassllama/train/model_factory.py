"""The model of a run: built from settings, with random weights or those of another model."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, cast, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from glassllama import hub
from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError, WeightsError, quoted
from glassllama.base.interfaces import Tokenizer
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.language_model import LanguageModel
from glassllama.models.llama import Llama
from glassllama.nn.dropout import add_dropout
from glassllama.nn.init import shapes_only
from glassllama.train.distributed import accept_full_tensors, is_sharded
from glassllama.train.settings import Settings, check_value, quoted_key, suggestion
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import as_tensor, torch_device

MODELS: dict[str, tuple[Any, Any]] = {
    "bigram": (BigramConfig, Bigram),
    "gpt": (GPTConfig, GPT),
    "llama": (LlamaConfig, Llama),
}
NOT_SIZES = ("max_seq_len", "rope_scaling", "rope_layout")  # given by data.context, or of others
LARGEST_SIZE, MAX_LAYERS = 1 << 20, 1000  # larger numbers are typing errors
# May differ from the model of init_from: a Llama has no weights for positions, and rows of query
# and key matrices can be reordered.
MAY_DIFFER = ("max_seq_len", "rope_layout")
ROTATED = ("attention.wq.weight", "attention.wk.weight")


def make_model(settings: Settings, vocab_size: int) -> LanguageModel:
    """A new model on `run.device`, its weights drawn from `run.seed`, in float32.

    Raises ConfigError as `new_model` does, or for a device that is not available.
    """
    model, device = new_model(settings, vocab_size), settings.run.device
    if torch_device(device, "run.device").type == "cpu" != device:
        raise ConfigError(f"run.device must be cpu without a number, got {quoted(device)}")
    model.initialize(torch.Generator().manual_seed(settings.run.seed))
    return cast(LanguageModel, as_module(model).to(device))


def new_model(settings: Settings, vocab_size: int) -> LanguageModel:
    """A model with uninitialized weights. Raises ConfigError as `new_config` does."""
    model = MODELS[settings.model.kind][1](new_config(settings, vocab_size))
    add_dropout(model, settings.model.dropout)
    return cast(LanguageModel, model)


def new_config(settings: Settings, vocab_size: int) -> Any:
    """The model's configuration, with `model.vocab_size` or the tokenizer's number of tokens.

    Raises ConfigError that names `model.field`: unknown, missing, not possible.
    """
    kind, config_class = settings.model.kind, MODELS[settings.model.kind][0]
    hints, sizes = get_type_hints(config_class), dict(settings.model.sizes)
    known = [f.name for f in fields(config_class) if f.name not in NOT_SIZES]
    for name, value in sizes.items():
        if name not in known:
            hint = suggestion(name, known)
            raise ConfigError(f"model.{quoted_key(name)}: a {kind} has no such setting{hint}")
        limit = MAX_LAYERS if name == "n_layers" else LARGEST_SIZE
        interval = f"[1, {limit}]" if hints[name] is int else ""
        sizes[name] = check_value(f"model.{name}", value, hints[name], interval=interval)
    rows = sizes.setdefault("vocab_size", vocab_size)
    if rows < vocab_size:
        raise ConfigError(f"model.vocab_size: {rows}, but the tokenizer has {vocab_size} tokens")
    try:
        return config_class(**sizes, max_seq_len=settings.data.context)
    except TypeError:  # a field without a default is missing
        missing = [name for name in known if name not in sizes]
        raise ConfigError(f"model: a {kind} also needs {', '.join(missing)}") from None
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None


def planned_parameters(settings: Settings, vocab_size: int) -> int:
    """The number of parameters of such a model, without building all of its layers.

    Raises ConfigError as `new_config` does.
    """
    layers = getattr(new_config(settings, vocab_size), "n_layers", None)

    def count(changes: dict[str, int]) -> int:
        sizes = {**settings.model.sizes, **changes}
        with shapes_only():
            changed = replace(settings, model=replace(settings.model, sizes=sizes))
            return count_parameters(new_model(changed, vocab_size))

    if layers is None:
        return count({})
    one, two = count({"n_layers": 1}), count({"n_layers": 2})
    return one + (layers - 1) * (two - one)


def count_parameters(model: LanguageModel) -> int:
    """The number of parameters; tied ones count once."""
    return sum(p.numel() for p in as_module(model).parameters())


def as_module(model: LanguageModel) -> nn.Module:
    """The same object, typed as the PyTorch module that it is."""
    return cast(nn.Module, model)


# --- weights of another model (model.init_from) ---------------------------------------------


def init_from(
    model: LanguageModel, source: str, tokenizer: Tokenizer, *, offline: bool = False
) -> None:
    """Copy the weights of the model that `source` names (as `load` takes it) into `model`.

    Raises WeightsError that lists every difference of configuration, shapes and vocabulary;
    GlassError if it cannot be found or read.
    """
    checkpoint = open_checkpoint(hub.resolve(source, offline=offline))
    try:
        require_same_model(checkpoint, model, tokenizer)
        sharded = is_sharded(model.tok_embeddings.weight)
        with torch.no_grad(), accept_full_tensors(sharded):
            for name, weight in as_module(model).named_parameters():
                tensor = as_tensor(checkpoint, name, torch.float32, weight.device)
                weight.copy_(in_layout_of(model.config, checkpoint.config, name, tensor))
                checkpoint.release_pages(name)
    finally:
        checkpoint.close()


def require_same_model(checkpoint: Checkpoint, model: LanguageModel, tokenizer: Tokenizer) -> None:
    theirs: Any = checkpoint.config
    ours: Any = model.config
    where = f"model.init_from: {checkpoint.path}"
    if type(theirs) is not type(ours):
        kinds = f"it is a {checkpoint.architecture.title}, this run trains a {type(model).__name__}"
        raise WeightsError(f"{where}: {kinds}: set model.kind")
    differences = []
    for name in (field.name for field in fields(ours) if field.name not in MAY_DIFFER):
        there, here = getattr(theirs, name), getattr(ours, name)
        # Some file formats have float32 precision only.
        both = isinstance(there, float) and isinstance(here, float)
        if np.float32(there) != np.float32(here) if both else there != here:
            differences.append(f"{name} is {quoted(there)} there and {quoted(here)} here")
    if not differences:  # shapes of a table of positions follow from data.context
        for name, weight in as_module(model).named_parameters():
            there, here = checkpoint.info(name).shape, tuple(weight.shape)
            if there != here:
                differences.append(f"{name} has shape {there} there and {here} here")
    differences = differences or vocabulary_difference(checkpoint.tokenizer, tokenizer)
    if differences:
        raise WeightsError(
            f"{where}: another model: {'; '.join(differences)}; change the settings of [model] "
            "and [data] to its values"
        )


def vocabulary_difference(theirs: Tokenizer, ours: Tokenizer) -> list[str]:
    """Another number of tokens, or the first id that stands for another text."""
    if theirs.vocab_size != ours.vocab_size:
        return [f"its tokenizer has {theirs.vocab_size} tokens and this run's {ours.vocab_size}"]
    for id in range(ours.vocab_size):
        there, here = theirs.token_bytes(id), ours.token_bytes(id)
        if there != here:
            return [f"token {id} is {quoted(there)} there and {quoted(here)} here (data.tokenizer)"]
    return []


def in_layout_of(ours: Any, theirs: Any, name: str, tensor: Tensor) -> Tensor:
    """Reorder the rows of query and key matrices of a Llama for our `rope_layout`.

    Models that are trained here rotate halves: neighboring rows (0, 1), (2, 3), … become rows
    (0, D/2), (1, D/2 + 1), …
    """
    rotated = hasattr(ours, "rope_layout") and name.endswith(ROTATED)
    if not rotated or theirs.rope_layout == ours.rope_layout:
        return tensor
    heads = tensor.unflatten(0, (-1, ours.head_dim // 2, 2))  # (n, D/2, 2, C)
    return heads.transpose(1, 2).flatten(0, 2)  # (n·D, C)
