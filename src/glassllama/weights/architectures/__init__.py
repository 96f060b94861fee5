"""The architecture registry: one description per architecture, found by the names in files.

Every module of this folder is imported; the `Architecture` objects in it are the registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from glassllama.base.errors import ConfigError, MissingExtraError, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.weights.architectures.description import Architecture, Resolved, hf_class


def descriptions() -> Iterator[Architecture]:
    """All descriptions in the modules of this folder."""
    for module in iter_modules(__path__, f"{__name__}."):
        yield from (
            found
            for found in vars(import_module(module.name)).values()
            if isinstance(found, Architecture)
        )


ARCHITECTURES = {one.name: one for one in descriptions()}
HF_CLASSES = {k: v for one in ARCHITECTURES.values() for k, v in one.hf_classes.items()}
BY_CLASS = {name: one for one in ARCHITECTURES.values() for name in one.hf_classes.values()}


def architecture_of(config: Any) -> Architecture:
    """The architecture that a configuration belongs to."""
    return ARCHITECTURES[config.architecture]


def hf_architecture(values: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names. Raises ConfigError: none, or two."""
    chosen, names = BY_CLASS[hf_class(values, HF_CLASSES)], values.get("architectures")
    if names and BY_CLASS[names[0]] is not chosen:
        raise ConfigError(
            f"config.json: model_type is {quoted(values['model_type'])}, but architectures is "
            f"{quoted(names)}"
        )
    return chosen


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
    known = {name: one for one in ARCHITECTURES.values() for name in one.gguf_names}
    if name not in known:
        supported = ", ".join(map(repr, known))
        raise ConfigError(
            f"GGUF: general.architecture is {quoted(name)}, supported are {supported}"
        )
    reader = known[name].config_from_gguf
    assert reader is not None
    return reader(file)
