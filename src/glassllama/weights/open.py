"""A path → a checkpoint: which files, which family, its configuration, and that both fit.

Nothing is loaded here. A `Checkpoint` hands out one tensor at a time under our own names; the torch
model (weights/load.py) and the engine (weights/pack.py) are both filled from it.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError, GlassError
from glassllama.base.interfaces import TensorFile, TensorInfo, Tokenizer
from glassllama.formats.blocks import SUPPORTED, dequantise
from glassllama.formats.gguf import open_gguf
from glassllama.formats.safetensors import open_safetensors
from glassllama.weights.architectures import TORCH_ONLY, architecture_of, resolve_torch_only
from glassllama.weights.configs import (
    Resolved,
    architecture,
    config_from_gguf,
    config_from_hf,
    config_from_meta,
)
from glassllama.weights.names import Family, fit
from glassllama.weights.shards import open_meta

if TYPE_CHECKING:
    from glassllama.weights.configs import ModelConfig

GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
LARGEST_JSON = 1 << 24  # a configuration of more than 16 MiB is none


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened, checked, unloaded model."""

    path: Path  # the file or folder that was asked for
    family: Family
    model_config: ModelConfig  # a Llama's, GPT's or bigram's
    file: TensorFile
    names: Mapping[str, str]  # our parameter name -> the file's, in the order of a forward pass
    notes: list[str] = field(default_factory=list)  # what was inferred, what has no effect

    @property
    def config(self) -> LlamaConfig:
        """A Llama's configuration. Raises ConfigError for a model that is none."""
        if not isinstance(self.model_config, LlamaConfig):
            raise ConfigError(f"{self.path}: {self.torch_only}, whole in memory")
        return self.model_config

    @property
    def architecture(self) -> str:
        """Llama, GPT or bigram."""
        if isinstance(self.model_config, LlamaConfig):
            return "Llama"
        return architecture_of(self.model_config).title

    @property
    def torch_only(self) -> str | None:
        """Why neither the engine nor anything else made for Llamas can run this; None: it can."""
        if isinstance(self.model_config, LlamaConfig):
            return None
        return f"a {self.architecture} runs on the torch backend only"

    def info(self, ours: str) -> TensorInfo:
        return self.file.info(self.names[ours])

    def read(self, ours: str, rows: slice | None = None) -> NDArray[Any]:
        """The tensor, or some of its rows, as stored (see TensorFile.read)."""
        return self.file.read(self.names[ours], rows)

    def float32(self, ours: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The tensor, or some of its rows, as float32: a copy."""
        info, raw = self.info(ours), self.read(ours, rows)
        return dequantise(raw, info.dtype, (*raw.shape[:1], *info.shape[1:]))

    def drop(self, ours: str) -> None:
        self.file.drop(self.names[ours])

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary that came with the weights. Raises TokenizerError."""
        from glassllama.weights.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

        if self.family == "gguf":
            return tokenizer_from_gguf(self.file.metadata)
        return tokenizer_from_folder(self.folder)

    @cached_property
    def chat_template(self) -> str | None:
        """The jinja text that came with the weights, if any."""
        from glassllama.weights.tokenizer import chat_template_from_folder

        if self.family == "gguf":
            return self.file.metadata.get("tokenizer.chat_template")
        return chat_template_from_folder(self.folder)

    @cached_property
    def template_tokens(self) -> dict[str, str]:
        """What the template's words `bos_token` and `eos_token` stand for."""
        from glassllama.weights.tokenizer import (
            template_tokens_from_folder,
            template_tokens_from_gguf,
        )

        if self.family == "gguf":
            return template_tokens_from_gguf(self.file.metadata)
        return template_tokens_from_folder(self.folder)

    def close(self) -> None:
        self.file.close()


def open_weights(path: Path | str) -> Checkpoint:
    """Open a GGUF file, a Hugging Face folder or a Meta folder (or a file in one).

    Raises GlassError: nothing there, nothing known there, FormatError (damaged), ConfigError
    (no model we support), WeightsError (tensors do not fit the configuration).
    """
    path = Path(path)
    if not path.exists():
        raise GlassError(f"{path}: no such file or folder")
    family, source = _recognise(path)
    file, (config, notes) = OPEN[family](source)
    try:
        if isinstance(config, LlamaConfig):
            names = fit(file, config, family, frozenset(SUPPORTED))
        else:
            file = architecture_of(config).open(file, config)
            names = {name: name for name in file.names()}
            notes = [*notes, f"a {architecture_of(config).title} runs on the torch backend only"]
    except GlassError as error:
        file.close()
        raise type(error)(f"{path}: {error}") from None
    return Checkpoint(
        path=source, family=family, model_config=config, file=file, names=names, notes=notes
    )


def _recognise(path: Path) -> tuple[Family, Path]:
    """Which family, and the file or folder to open."""
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf", path
        if path.suffix == ".pth":
            return "meta", path
        if path.name.endswith((".safetensors", "config.json", ".safetensors.index.json")):
            return "hf", path.parent
        raise GlassError(f"{path}: not a .gguf, .safetensors or .pth file")
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return "hf", path
    for folder in (path, path / "original"):
        if (folder / "params.json").exists():
            return "meta", folder
    models = sorted(path.glob("*.gguf"))
    firsts = [m for m in models if not (p := GGUF_PART.fullmatch(m.name)) or int(p[2]) == 1]
    if len(firsts) == 1:
        return "gguf", firsts[0]
    if firsts:
        raise GlassError(f"{path}: holds {len(firsts)} GGUF models, name one of them")
    if (path / "config.json").exists():
        raise GlassError(f"{path}: config.json without *.safetensors; re-save as safetensors")
    raise GlassError(
        f"{path}: no model here (looked for *.gguf, config.json with *.safetensors, params.json "
        "with consolidated.*.pth)"
    )


def _open_gguf(path: Path) -> tuple[TensorFile, Resolved]:
    file = open_gguf(path)
    return file, config_from_gguf(file)


def _open_hf(folder: Path) -> tuple[TensorFile, Resolved]:
    values = read_json(folder / "config.json")
    name = architecture(values)
    resolved = resolve_torch_only(name, values) if name in TORCH_ONLY else config_from_hf(values)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return open_safetensors(index), resolved
    files = sorted(folder.glob("*.safetensors"))
    if not single.exists() and len(files) != 1:
        raise GlassError(f"{folder}: {len(files)} safetensors files, but no {index.name}")
    return open_safetensors(single if single.exists() else files[0]), resolved


def _open_meta(path: Path) -> tuple[TensorFile, Resolved]:
    folder = path if path.is_dir() else path.parent
    values = read_json(folder / "params.json")
    paths = sorted(folder.glob("consolidated.*.pth")) if path.is_dir() else [path]
    paths = paths or sorted(folder.glob("*.pth"))
    if not paths:
        raise GlassError(f"{folder}: params.json without any .pth file")
    if re.fullmatch(r"consolidated\.\d\d\.pth", path.name):
        paths = sorted(folder.glob("consolidated.*.pth"))  # one shard stands for all
    _complete(paths)
    file = open_meta(paths, dim=values.get("dim", 0))
    names = set(file.names())
    if "tok_embeddings.weight" not in names:
        raise ConfigError(f"{folder}: tok_embeddings.weight is missing: not a Llama of Meta's")
    rows = file.info("tok_embeddings.weight").shape[0]
    return file, config_from_meta(values, rows, tied="output.weight" not in names)


OPEN = {"gguf": _open_gguf, "hf": _open_hf, "meta": _open_meta}


def _complete(paths: list[Path]) -> None:
    """Shards are numbered from 00 without gaps, or one would be silently missing."""
    for expected, path in enumerate(paths):
        number = re.fullmatch(r"consolidated\.(\d\d)\.pth", path.name)
        if number and int(number[1]) != expected:
            raise GlassError(f"{path.parent}: consolidated.{expected:02d}.pth is missing")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError: no regular file, too large, no object.

    What is no file, a pipe for one, might never end, or never begin.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: is not a regular file")
        if status.st_size > LARGEST_JSON:
            raise ConfigError(f"{path}: larger than any configuration")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
