"""Begin a run with the weights of another model (`model.init_from`) instead of random ones.

Called by train/prepare.py for a run that has no checkpoint of its own yet. The other model must be
the same architecture with the same sizes and the same vocabulary; everything that differs is named.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from glassllama import hub
from glassllama.base.errors import WeightsError, quoted
from glassllama.base.interfaces import Tokenizer
from glassllama.models.language_model import LanguageModel
from glassllama.train.distributed import is_sharded
from glassllama.train.model_factory import as_module
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import as_tensor

# May differ: a Llama has no weights for positions, and the order of coordinates can be changed.
NO_MATTER = ("max_seq_len", "rope_layout")
INTERLEAVED = "interleaved"
ROTATED = ("attention.wq.weight", "attention.wk.weight")


def fill_from(
    model: LanguageModel, source: str, tokenizer: Tokenizer, *, offline: bool = False
) -> None:
    """Copy the weights of the model that `source` names (as `load` takes it) into `model`.

    Raises WeightsError listing every difference of configuration, shapes and vocabulary;
    GlassError where it cannot be found or read.
    """
    checkpoint = open_checkpoint(hub.resolve(source, offline=offline))
    try:
        require_same_model(checkpoint, model, tokenizer)
        with torch.no_grad(), whole_tensors_into(model):
            for name, weight in as_module(model).named_parameters():
                tensor = as_tensor(checkpoint, name, torch.float32, weight.device)
                weight.copy_(in_layout_of(model.config, checkpoint.config, name, tensor))
                checkpoint.release_pages(name)
    finally:
        checkpoint.close()


def whole_tensors_into(model: LanguageModel) -> AbstractContextManager[object]:
    """Within, a rank may copy a whole tensor into its share of a weight."""
    if not is_sharded(model.tok_embeddings.weight):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return cast(AbstractContextManager[object], implicit_replication())


def require_same_model(checkpoint: Checkpoint, model: LanguageModel, tokenizer: Tokenizer) -> None:
    theirs: Any = checkpoint.config
    ours: Any = model.config
    if type(theirs) is not type(ours):
        kinds = f"it is a {checkpoint.architecture.title}, this run trains a {type(model).__name__}"
        raise WeightsError(f"model.init_from: {checkpoint.path}: {kinds}: set model.kind")
    names = [field.name for field in fields(ours) if field.name not in NO_MATTER]
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    differences = [
        f"{name} is {quoted(there)} there and {quoted(here)} here"
        for name, there, here in pairs
        if not equal(there, here)
    ]
    shapes = {name: tuple(weight.shape) for name, weight in as_module(model).named_parameters()}
    if not differences:  # those of a table of positions follow from data.context
        differences = [
            f"{name} has shape {checkpoint.info(name).shape} there and {shape} here"
            for name, shape in shapes.items()
            if checkpoint.info(name).shape != shape
        ]
    differences = differences or other_tokens(checkpoint.tokenizer, tokenizer)
    if differences:
        raise WeightsError(
            f"model.init_from: {checkpoint.path}: another model: {'; '.join(differences)}; change "
            "the settings of [model] and [data] to its values"
        )


def equal(there: Any, here: Any) -> bool:
    """Numbers are equal in float32: files of some formats hold no more digits."""
    if isinstance(there, float) and isinstance(here, float):
        return bool(np.float32(there) == np.float32(here))
    return bool(there == here)


def other_tokens(theirs: Tokenizer, ours: Tokenizer) -> list[str]:
    """The first id that is another text in the two vocabularies of one size, if there is any."""
    if theirs.vocab_size != ours.vocab_size:
        return [f"its tokenizer has {theirs.vocab_size} tokens and this run's {ours.vocab_size}"]
    for id in range(ours.vocab_size):
        there, here = theirs.token_bytes(id), ours.token_bytes(id)
        if there != here:
            return [f"token {id} is {quoted(there)} there and {quoted(here)} here (data.tokenizer)"]
    return []


def in_layout_of(ours: Any, theirs: Any, name: str, tensor: Tensor) -> Tensor:
    """Rows of query and key matrices in the order that `ours.rope_layout` rotates them in.

    Neighbours (0, 1), (2, 3), … become halves (0, D/2), (1, D/2 + 1), …: the same model.
    """
    rotated = hasattr(ours, "rope_layout") and name.endswith(ROTATED)
    if not rotated or theirs.rope_layout == ours.rope_layout:
        return tensor
    assert theirs.rope_layout == INTERLEAVED  # models that are trained here rotate halves
    heads = tensor.unflatten(0, (-1, ours.head_dim // 2, 2))  # (n, D/2, 2, C)
    return heads.transpose(1, 2).flatten(0, 2)  # (n·D, C)
