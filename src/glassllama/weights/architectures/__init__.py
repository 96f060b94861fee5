"""The architecture registry: one description per architecture, found by the names in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glassllama.base.errors import ConfigError, MissingExtraError, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.weights.architectures.bigram import BIGRAM
from glassllama.weights.architectures.description import Architecture, Resolved, hf_class
from glassllama.weights.architectures.gpt2 import GPT2
from glassllama.weights.architectures.llama import LLAMA

ARCHITECTURES = {architecture.name: architecture for architecture in (LLAMA, GPT2, BIGRAM)}
HF_CLASSES = {
    model_type: name
    for architecture in ARCHITECTURES.values()
    for model_type, name in architecture.hf_classes.items()
}


def architecture_of(config: Any) -> Architecture:
    """The architecture that a configuration belongs to."""
    return ARCHITECTURES[config.architecture]


def hf_architecture(values: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names. Raises ConfigError: none, or two."""
    chosen = _with_class(hf_class(values, HF_CLASSES))
    names = values.get("architectures")
    if names and _with_class(names[0]) is not chosen:
        raise ConfigError(
            f"config.json: model_type is {quoted(values['model_type'])}, but architectures is "
            f"{quoted(names)}"
        )
    return chosen


def _with_class(name: str) -> Architecture:
    return next(one for one in ARCHITECTURES.values() if name in one.hf_classes.values())


def config_from_hf(values: Mapping[str, Any]) -> Resolved:
    """The configuration in a config.json. Raises ConfigError, MissingExtraError."""
    architecture = hf_architecture(values)
    try:
        return architecture.config_from_hf(values)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError(f"a {architecture.title} runs on PyTorch, which", "torch") from None


def config_from_gguf(file: TensorFile) -> Resolved:
    """The configuration in a GGUF file. Raises ConfigError."""
    name = Fields("GGUF", file.metadata).text("general.architecture", None)
    readers = {
        known: architecture.config_from_gguf
        for architecture in ARCHITECTURES.values()
        for known in architecture.gguf_names
    }
    reader = readers.get(name or "")
    if reader is None:
        supported = ", ".join(map(repr, readers))
        raise ConfigError(
            f"GGUF: general.architecture is {quoted(name)}, supported are {supported}"
        )
    return reader(file)


def config_from_meta(values: Mapping[str, Any], file: TensorFile) -> Resolved:
    """The configuration in a params.json and the tensors beside it: always a Llama."""
    assert LLAMA.config_from_meta is not None
    return LLAMA.config_from_meta(values, file)
