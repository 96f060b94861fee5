"""The form in which an architecture is described: names in files, configuration, tensors, model.

One description per architecture, in a file of its own beside this one. Whatever opens, loads, saves
or shows a checkpoint reads descriptions and knows no architecture by name.
"""

from __future__ import annotations

import math
import re
from collections import UserDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import groupby
from typing import Any, Literal, NamedTuple

from glassllama.base.errors import ConfigError, join_names, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.base.layer_plan import ModelPlan

FileFormat = Literal["meta", "hf", "gguf"]

# Letters of a shape -> the field of the configuration.
LETTERS = {
    "C": "dim", "H": "n_heads", "K": "n_kv_heads", "D": "head_dim", "F": "ffn_dim",
    "V": "vocab_size", "S": "max_seq_len",
}  # fmt: skip


class Resolved(NamedTuple):
    """A configuration, and notes on what the file did not say or what has no effect here."""

    config: Any
    notes: list[str]


@dataclass(frozen=True)
class Stored:
    """How a file stores one of our tensors, if not under a name of its own and as it is.

    With `parts`, several matrices are stored as one, stacked along their output axis: ours is the
    one number `part`. If `transposed`, the file has (in, out) instead of (out, in). If `less_one`,
    the file has w where ours is 1 + w.
    """

    name: str
    transposed: bool = False
    less_one: bool = False
    parts: tuple[str, ...] = ()  # rows of each matrix, products of letters
    part: int = 0


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """One of our parameters and where each file format has it; `{}` is the number of the layer.

    Each entry of `shape` is a product of LETTERS, such as "H*D".
    """

    ours: str
    shape: tuple[str, ...]
    hf: str | Stored | None = None
    gguf: str | Stored | None = None
    meta: str | Stored | None = None
    absent_if: str = ""  # a field of the configuration: if true, the model has no such tensor
    zero_unless: str = ""  # a field: if false, the file must hold zeros, and the model has no such


@dataclass(frozen=True, kw_only=True)
class MappedTensor:
    """A rule applied to a configuration and a file format: all names and numbers."""

    ours: str
    theirs: str  # the file's name
    shape: tuple[int, ...]  # of ours
    stored_shape: tuple[int, ...]  # of the file's
    transposed: bool
    less_one: bool
    first_row: int  # of ours among the rows of a stored tensor that holds several
    is_zero: bool  # the file must hold zeros; not a parameter of ours

    @property
    def as_stored(self) -> bool:
        """Whether the file's tensor is ours, as it is."""
        return self.shape == self.stored_shape and self.is_slice

    @property
    def is_slice(self) -> bool:
        """Whether ours is a range of the rows of the file's tensor, number by number."""
        return not self.transposed and not self.less_one


@dataclass(frozen=True)
class ExtraTensors:
    """Tensors that may be in a file and are not loaded, because the configuration says the same.

    `as_expected` compares one with the configuration; `note` names those that differ.
    """

    names: re.Pattern[str]
    as_expected: Callable[[TensorFile, str, Any], bool]
    note: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A description. `Any` is the architecture's own configuration, a frozen dataclass.

    Its class has the class variable `architecture`, the `name` of this description.
    """

    name: str
    title: str  # for messages
    hf_classes: Mapping[str, str]  # model_type of a config.json -> its class in transformers
    config_from_hf: Callable[[Mapping[str, Any]], Resolved]  # of a config.json
    config_to_hf: Callable[[Any], dict[str, Any]]  # raises ConfigError if it cannot be said there
    gguf_names: tuple[str, ...] = ()  # general.architecture
    config_from_gguf: Callable[[TensorFile], Resolved] | None = None
    rules: tuple[TensorRule, ...]  # in the order of a forward pass: embeddings first
    optional_prefix: str = ""  # of names in Hugging Face's format: some writers leave it out
    extras: Mapping[FileFormat, tuple[ExtraTensors, ...]]
    model: str  # "module:class" of the reference model, imported when it is needed
    layer_plan: Callable[[Any], ModelPlan] | None  # None: only PyTorch runs it

    @property
    def torch_only(self) -> str:
        """The message for models without a layer plan."""
        return f"a {self.title} runs on the torch backend only"

    def model_class(self) -> Any:
        """The class of the reference model; needs PyTorch."""
        module, _, name = self.model.partition(":")
        return getattr(import_module(module), name)

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Our parameter names -> shapes, in the order of a forward pass."""
        found = self.tensors(config, "hf")
        return {tensor.ours: tensor.shape for tensor in found if not tensor.is_zero}

    def tensors(
        self, config: Any, file_format: FileFormat, present: Collection[str] = ()
    ) -> list[MappedTensor]:
        """All tensors of a model with this configuration, and where this format has them.

        `present` are the names in a file, which may lack the optional prefix.
        """
        layers, found = getattr(config, "n_layers", 0), list[MappedTensor]()
        for in_layers, group in groupby(self.rules, key=lambda rule: "{}" in rule.ours):
            rules = [rule for rule in group if not getattr(config, rule.absent_if, False)]
            for n in range(layers if in_layers else 1):
                found += (apply(rule, config, file_format, n) for rule in rules)
        prefix = self.optional_prefix
        if prefix and found[0].theirs.removeprefix(prefix) in present:
            found = [replace(t, theirs=t.theirs.removeprefix(prefix)) for t in found]
        return found


def apply(rule: TensorRule, config: Any, file_format: FileFormat, layer: int) -> MappedTensor:
    stored = getattr(rule, file_format)
    assert stored is not None, f"{rule.ours} has no name in the format {file_format}"
    stored = Stored(stored) if isinstance(stored, str) else stored
    shape = tuple(size(product, config) for product in rule.shape)
    rows = [size(part, config) for part in stored.parts]
    stored_shape = (sum(rows), *shape[1:]) if rows else shape
    return MappedTensor(
        ours=rule.ours.format(layer), theirs=stored.name.format(layer), shape=shape,
        stored_shape=stored_shape[::-1] if stored.transposed else stored_shape,
        transposed=stored.transposed, less_one=stored.less_one,
        first_row=sum(rows[: stored.part]),
        is_zero=bool(rule.zero_unless) and not getattr(config, rule.zero_unless),
    )  # fmt: skip


def size(product: str, config: Any) -> int:
    """The number that a product of letters stands for."""
    return math.prod(getattr(config, LETTERS[letter]) for letter in product.split("*"))


# --- helpers for readers of configurations --------------------------------------------------

# Keys that may be in a config.json and change nothing that a forward pass computes.
HF_WITHOUT_EFFECT = frozenset(
    "_name_or_path architectures attention_dropout attn_implementation auto_map bos_token_id dtype "
    "eos_token_id hidden_dropout initializer_range is_llama_config model_type pad_token_id "
    "pretraining_tp rope_interleaved torch_dtype transformers_version transformers.js_config "
    "use_cache return_dict output_hidden_states output_attentions problem_type id2label label2id "
    "chunk_size_feed_forward is_encoder_decoder _attn_implementation_autoset tokenizer_class "
    "unsloth_version unsloth_fixed rope_layout".split()
)


class ReadKeys(UserDict[str, Any]):
    """Foreign values that record which keys were read, so that the others can be named."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.used = set[str]()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return super().__getitem__(key)

    def unused(self, without_effect: Collection[str] = HF_WITHOUT_EFFECT) -> set[str]:
        return self.keys() - self.used - set(without_effect)


def unused_note(unused: Collection[str], file: str = "config.json") -> list[str]:
    """A note that names the keys of a configuration that have no effect here, if there are any."""
    return [f"{file}: no effect here: {join_names(unused)}"] if unused else []


def require_neutral(
    values: Mapping[str, Any], neutral: Mapping[str, Any], file: str = "config.json"
) -> None:
    """Raise ConfigError if a key that changes the arithmetic has another value than `neutral` says.

    null is the same as a missing key.
    """
    for key, expected in neutral.items():
        value = values.get(key)
        both_boolean = isinstance(value, bool) == isinstance(expected, bool)
        if value is not None and (value != expected or not both_boolean):
            raise ConfigError(f"{file}: {key} is {quoted(value)}, only {expected!r} is supported")


def hf_class(values: Mapping[str, Any], classes: Mapping[str, str]) -> str:
    """The model class that a config.json names, by `model_type` first, as transformers does.

    `classes` are the known ones by their model_type; a file that names none is a Llama's. Raises
    ConfigError if it names an unknown one.
    """
    get = Fields("config.json", values)
    model_type, names = get.text("model_type", None), get.items("architectures", (), of="text")
    for key, came, unknown in (
        ("model_type", model_type, model_type not in (None, *classes)),
        ("architectures", names, names and names[0] not in classes.values()),
    ):
        if unknown:
            supported = ", ".join(f"{known} ({name})" for known, name in classes.items())
            raise ConfigError(f"config.json: {key} is {quoted(came)}, supported are {supported}")
    if model_type is None:
        return str(names[0]) if names else classes["llama"]
    return classes[model_type]
