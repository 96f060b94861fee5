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
from glassllama.base.errors import (
    ConfigError,
    GlassError,
    MissingExtraError,
    TokenizerError,
    named,
)
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile, TensorInfo, Tokenizer
from glassllama.formats.blocks import SUPPORTED, dequantize
from glassllama.formats.first_bytes import Container, format_of, formats_in
from glassllama.formats.gguf import GGUFFile, open_gguf
from glassllama.formats.safetensors import open_safetensors, shard_names
from glassllama.tokenizers.vocabulary import TokenizerBase
from glassllama.weights.architectures import TORCH_ONLY, architecture_of, resolve_torch_only
from glassllama.weights.configs import (
    Resolved,
    architecture,
    config_from_gguf,
    config_from_hf,
    config_from_meta,
    embedding_rows,
)
from glassllama.weights.shards import open_meta
from glassllama.weights.tensor_map import FileFormat, fit

if TYPE_CHECKING:
    from glassllama.weights.configs import ModelConfig

GGUF_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)
SHARD = re.compile(r"consolidated\.([0-9][0-9])\.[^.]+", re.IGNORECASE)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
ADAPTER = "adapter_config.json"  # of PEFT: changes to the weights of another model
ADAPTER_ONLY = (
    "without a model: an adapter only changes the weights of another; merge both with PEFT's "
    "merge_and_unload, and save the result"
)
LARGEST_JSON = 1 << 24  # a configuration of more than 16 MiB is none


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened, checked, unloaded model."""

    path: Path  # the file or folder that was asked for
    file_format: FileFormat
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
        return dequantize(raw, info.dtype, (*raw.shape[:1], *info.shape[1:]))

    def release_pages(self, ours: str) -> None:
        self.file.release_pages(self.names[ours])

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary that came with the weights. Raises TokenizerError."""
        from glassllama.weights.tokenizer import tokenizer_from_folder
        from glassllama.weights.tokenizer_gguf import tokenizer_from_gguf

        gguf, rows = self.file_format == "gguf", self.model_config.vocab_size
        found: Tokenizer = (
            tokenizer_from_gguf(self.file.metadata) if gguf else tokenizer_from_folder(self.folder)
        )
        self.notes.extend(getattr(found, "notes", []))
        if isinstance(found, TokenizerBase):
            found.model_rows = rows
        if found.vocab_size > rows:
            self.notes.append(
                f"the tokenizer has {found.vocab_size} tokens, the model {rows}: texts with one of "
                f"the last {found.vocab_size - rows} cannot be read"
            )
        return found

    @cached_property
    def chat_template(self) -> str | None:
        """The jinja text that came with the weights, if any."""
        from glassllama.weights.tokenizer import chat_template_from_folder

        if self.file_format == "gguf":
            get = Fields("GGUF", self.file.metadata, TokenizerError)
            return get.text("tokenizer.chat_template", None)
        return chat_template_from_folder(self.folder)

    @cached_property
    def template_tokens(self) -> dict[str, str]:
        """What the template's words `bos_token`, `eos_token` and others ending so stand for."""
        from glassllama.weights.tokenizer import template_tokens_from_folder
        from glassllama.weights.tokenizer_gguf import template_tokens_from_gguf

        if self.file_format == "gguf":
            return template_tokens_from_gguf(self.file.metadata)
        return template_tokens_from_folder(self.folder)

    def close(self) -> None:
        self.file.close()


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a GGUF file, a Hugging Face folder or a Meta folder (or a file in one).

    Raises GlassError: nothing there, nothing known there, FormatError (damaged), ConfigError
    (no model we support), WeightsError (tensors do not fit the configuration).
    """
    path = Path(path)
    if not path.exists():
        raise GlassError(f"{path}: no such file or folder")
    try:
        return _opened(*_recognise(path))
    except MissingExtraError:
        raise
    except GlassError as error:
        folder = str(path if path.is_dir() else path.parent)
        if str(error).startswith(folder):
            raise
        raise type(error)(f"{path}: {error}") from None


def _opened(file_format: FileFormat, source: Path) -> Checkpoint:
    resolved = _config_from_folder(source) if file_format == "hf" else None  # before any other file
    file = FILES[file_format](source)
    try:
        config, notes = resolved or _config_from_file(source, file)
        if file_format == "hf":
            notes = [*notes, *_index_notes(source), *_adapter_notes(source)]
        if isinstance(config, LlamaConfig):
            fitted = fit(file, config, file_format, frozenset(SUPPORTED))
            config, names, notes = fitted.config, fitted.names, [*notes, *fitted.notes]
        else:
            one = architecture_of(config)
            file, config, more = one.open(file, config)
            names = {name: name for name in file.names()}
            notes = [*notes, *more, f"a {one.title} runs on the torch backend only"]
    except GlassError:
        file.close()
        raise
    return Checkpoint(
        path=source,
        file_format=file_format,
        model_config=config,
        file=file,
        names=names,
        notes=notes,
    )


def _recognise(path: Path) -> tuple[FileFormat, Path]:
    """Which family, and the file or folder to open."""
    if path.is_file():
        return _recognise_file(path)
    if not path.is_dir():
        raise GlassError(f"{path}: neither a regular file nor a folder")
    formats = formats_in(path)
    has_config = (path / "config.json").exists()
    if has_config and any(_is_named_safetensors(file) for file in _models_in(formats)):
        return "hf", path
    for folder in (path, path / "original"):
        if (folder / "params.json").exists() and _meta_files(folder):
            return "meta", folder
    models = [file for file in _all_of("gguf", formats) if file.is_file()]
    firsts = [m for m in models if not (p := GGUF_PART.fullmatch(m.name)) or int(p[2]) == 1]
    if len(firsts) == 1:
        return "gguf", firsts[0]
    if firsts:
        raise GlassError(f"{path}: holds {len(firsts)} GGUF models, name one of them")
    if has_config and (_models_in(formats) or _index(path) is not None):
        return "hf", path
    for folder in (path, path / "original"):
        if (folder / "params.json").exists():
            return "meta", folder  # which says what is missing
    if has_config:
        raise _no_safetensors(path, formats)
    raise _no_model(path)


def _no_model(path: Path) -> GlassError:
    """The error for a folder without weights of any form."""
    if (path / "settings.toml").is_file():
        return GlassError(
            f"{path}: a training run that has saved no model yet; go on with it: glassllama train "
            f"{path / 'settings.toml'} --out {path} --resume auto"
        )
    if (path / ADAPTER).exists():
        return GlassError(f"{path}: {ADAPTER} {ADAPTER_ONLY}")
    return GlassError(
        f"{path}: no model here (looked for *.gguf, config.json with *.safetensors, params.json "
        "with consolidated.*.pth)"
    )


def _recognise_file(path: Path) -> tuple[FileFormat, Path]:
    """The same for a file: by its first bytes, whatever it is called."""
    try:
        format, folder = format_of(path), path.parent
    except OSError as error:
        raise GlassError(f"{path}: cannot be read: {error.strerror or error}") from None
    name = path.name.lower()
    if format == "gguf":
        return "gguf", path
    if format == "safetensors" or (format is None and name.endswith(INDEX_ENDING)):
        return "hf", _whole_of(path)
    if format is None and name.endswith("config.json"):
        return _recognise(folder)
    if format is None:
        raise GlassError(f"{path}: not a .gguf, .safetensors or .pth file")
    if name.endswith(".pth") or (folder / "params.json").exists():
        return "meta", path
    raise GlassError(_is_pickle(path))


def _all_of(format: Container, formats: Mapping[Path, Container]) -> list[Path]:
    return [path for path, its_format in formats.items() if its_format == format]


def _models_in(formats: Mapping[Path, Container]) -> list[Path]:
    """Safetensors files but for those of an adapter."""
    files = _all_of("safetensors", formats)
    return [file for file in files if not file.name.lower().startswith("adapter_model.")]


def _is_named_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _no_safetensors(folder: Path, formats: Mapping[Path, Container]) -> GlassError:
    """The error for a folder of Hugging Face's form whose weights are not there, or pickled."""
    # An architecture that is not supported first: saving its weights again would not help.
    architecture(read_json(folder / "config.json"))
    if (folder / ADAPTER).exists():
        return GlassError(f"{folder}: {ADAPTER} {ADAPTER_ONLY}")
    pickled = any(format in ("zip", "pickle") for format in formats.values())
    if pickled or any(path.suffix.lower() == ".bin" for path in folder.glob("*")):
        return GlassError(_is_pickle(folder))
    return GlassError(f"{folder}: config.json without *.safetensors; {_resave(folder)}")


def _is_pickle(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    return f"{path}: PyTorch's pickle files (torch.save) are not read here; {_resave(folder)}"


def _resave(folder: Path) -> str:
    """The two lines of Python after which there are safetensors."""
    to = str(folder.absolute()) + "-safetensors"
    return (
        "save it as safetensors with these two lines of Python: "
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(folder)!r}).save_pretrained({to!r})"
    )


def _index(folder: Path) -> Path | None:
    """The folder's index of shards, or None."""
    indexes = sorted(p for p in folder.glob("*") if p.name.lower().endswith(INDEX_ENDING))
    if (folder / INDEX).exists():
        return folder / INDEX
    return indexes[0] if len(indexes) == 1 else None


def _safetensors(folder: Path) -> list[Path]:
    """The files that hold the folder's model, its index first where they are read by one.

    model.safetensors is the model where the index does not name it, as in transformers.
    """
    single, index = folder / SINGLE, _index(folder)
    if index is not None:
        shards = shard_names(index)
        if SINGLE in shards or not single.is_file():
            return [index, *(folder / name for name in shards)]
    if single.is_file():
        return [single]
    files = _models_in(formats_in(folder))
    return [file for file in files if _is_named_safetensors(file)] or files


def _whole_of(path: Path) -> Path:
    """The folder, index or file to open when the user names one file of a safetensors model."""
    if path in _safetensors(path.parent):
        return path.parent
    index = _index(path.parent)
    return index if index is not None and path.name in shard_names(index) else path


def _adapter_notes(source: Path) -> list[str]:
    """A note where there is an adapter, whose changes are not made."""
    folder = source if source.is_dir() else source.parent
    if not (folder / ADAPTER).exists():
        return []
    return [f"{ADAPTER}: the adapter beside the model is not applied; merge it first"]


def _index_notes(source: Path) -> list[str]:
    """A note where model.safetensors is read although there is an index."""
    index = _index(source) if source.is_dir() else None
    if index is None or index in _safetensors(source):
        return []
    return [f"{SINGLE} is read, not the files that {named(index.name)} names"]


def _open_hf(source: Path) -> TensorFile:
    if source.is_file():
        return open_safetensors(source)
    files = _safetensors(source)
    if files[0] != _index(source) and len(files) != 1:
        raise GlassError(f"{source}: {len(files)} safetensors files, but no {INDEX}")
    return open_safetensors(files[0])


def _meta_files(folder: Path) -> list[Path]:
    """Meta's weights in a folder: consolidated.NN.* before other .pth files, then any other."""
    formats = formats_in(folder)
    files = [*_all_of("zip", formats), *_all_of("pickle", formats)]
    named_pth = [file for file in files if file.suffix.lower() == ".pth"]
    for shards in (
        [file for file in named_pth if SHARD.fullmatch(file.name)],
        [file for file in files if SHARD.fullmatch(file.name)],
        named_pth,
    ):
        if shards:
            return sorted(shards)
    return sorted(files)


def _open_meta(path: Path) -> TensorFile:
    folder = path if path.is_dir() else path.parent
    dim = Fields("params.json", read_json(folder / "params.json")).whole("dim", 0)
    paths = _meta_files(folder)
    if path.is_file() and not (SHARD.fullmatch(path.name) and path in paths):
        paths = [path]  # one shard stands for all
    if not paths:
        raise GlassError(f"{folder}: params.json without any .pth file")
    first = paths[0].name
    if len(paths) > 1 and not (first.lower().endswith(".pth") or SHARD.fullmatch(first)):
        raise GlassError(f"{folder}: {len(paths)} files of PyTorch's, name one of them")
    _complete(paths)
    return open_meta(paths, dim=dim)


FILES = {"gguf": open_gguf, "hf": _open_hf, "meta": _open_meta}


def _config_from_folder(source: Path) -> Resolved:
    values = read_json((source if source.is_dir() else source.parent) / "config.json")
    name = architecture(values)
    return resolve_torch_only(name, values) if name in TORCH_ONLY else config_from_hf(values)


def _config_from_file(source: Path, file: TensorFile) -> Resolved:
    """What a GGUF says of itself, or what params.json and Meta's tensors say together."""
    if isinstance(file, GGUFFile):
        return config_from_gguf(file)
    folder = source if source.is_dir() else source.parent
    names = set(file.names())
    if "tok_embeddings.weight" not in names:
        raise ConfigError(f"{folder}: tok_embeddings.weight is missing: not a Llama of Meta's")
    rows = embedding_rows(file, "tok_embeddings.weight")
    values = read_json(folder / "params.json")
    return config_from_meta(values, rows, tied="output.weight" not in names)


def _complete(paths: list[Path]) -> None:
    """Shards are numbered from 00 without gaps, or one would be silently missing."""
    for expected, path in enumerate(paths):
        number = SHARD.fullmatch(path.name)
        if number and int(number[1]) != expected:
            raise GlassError(f"{path.parent}: consolidated.{expected:02d}{path.suffix} is missing")


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
