"""A path → a checkpoint: its files, its architecture and configuration, its tensors.

Nothing is loaded here. A `Checkpoint` reads one tensor at a time under our own names; the PyTorch
model (weights/load.py) and the engine (weights/pack.py) are both filled from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import with_context
from glassllama.base.errors import ConfigError, GlassError, MissingExtraError, TokenizerError
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile, TensorInfo, Tokenizer
from glassllama.base.layer_plan import ModelPlan
from glassllama.formats.blocks import dequantize
from glassllama.tokenizers.vocabulary import TokenizerBase
from glassllama.weights.architectures import architecture_of, config_from_gguf, config_from_hf
from glassllama.weights.architectures.description import (
    Architecture,
    FileFormat,
    MappedTensor,
    Resolved,
)
from glassllama.weights.architectures.llama import read_meta
from glassllama.weights.generation_config import (
    SamplingDefaults,
    defaults_from_folder,
    defaults_from_gguf,
)
from glassllama.weights.model_files import OPEN, find_model, hf_notes, read_json
from glassllama.weights.tensor_map import match_tensors
from glassllama.weights.vision_language import (
    ImagePart,
    family_of,
    find_mmproj,
    gguf_images,
    split,
    text_values,
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened, checked model whose weights are not loaded."""

    path: Path  # the file or folder
    file_format: FileFormat
    architecture: Architecture
    config: Any  # the architecture's configuration
    file: TensorFile
    tensors: Mapping[str, MappedTensor]  # by our parameter names, in the order of a forward pass
    notes: list[str] = field(default_factory=list)  # what was inferred, what has no effect
    images: ImagePart | None = None  # of a model that reads pictures, too

    @property
    def names(self) -> dict[str, str]:
        """Our parameter names -> the file's, in the order of a forward pass."""
        return {ours: tensor.theirs for ours, tensor in self.tensors.items()}

    @cached_property
    def layer_plan(self) -> ModelPlan:
        """What the engine runs. Raises ConfigError if only PyTorch runs this architecture."""
        if self.architecture.layer_plan is None:
            raise ConfigError(f"{self.path}: {self.architecture.torch_only}, whole in memory")
        return self.architecture.layer_plan(self.config)

    def info(self, ours: str) -> TensorInfo:
        """Shape, type and size of one of our parameters.

        Path and offset are those of the stored tensor, which may hold others, too.
        """
        tensor = self.tensors[ours]
        info = self.file.info(tensor.theirs)
        if tensor.as_stored:
            return info
        stored_rows = tensor.stored_shape[-1 if tensor.transposed else 0]
        nbytes = info.nbytes // stored_rows * tensor.shape[0]
        dtype = "F32" if tensor.less_one else info.dtype  # 1 + w is computed in float32
        return replace(info, name=ours, shape=tensor.shape, nbytes=nbytes, dtype=dtype)

    def read(self, ours: str, rows: slice | None = None) -> NDArray[Any]:
        """The tensor, or some of its rows, as stored (see TensorFile.read)."""
        tensor = self.tensors[ours]
        if tensor.as_stored:
            return self.file.read(tensor.theirs, rows)
        if tensor.is_slice:
            start, stop, _ = (rows or slice(None)).indices(tensor.shape[0])
            first = tensor.first_row
            return self.file.read(tensor.theirs, slice(first + start, first + stop))
        stored = self.file.read(tensor.theirs)
        if tensor.less_one:
            info = self.file.info(tensor.theirs)
            stored = dequantize(stored, info.dtype, info.shape) + np.float32(1)
        stored = stored.T if tensor.transposed else stored
        matrix = stored[tensor.first_row : tensor.first_row + tensor.shape[0]]
        return np.ascontiguousarray(matrix if rows is None else matrix[rows])

    def float32(self, ours: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The tensor, or some of its rows, as float32: a copy."""
        info, raw = self.info(ours), self.read(ours, rows)
        return dequantize(raw, info.dtype, (*raw.shape[:1], *info.shape[1:]))

    def release_pages(self, ours: str) -> None:
        """Give the mapped pages of this tensor back to the system."""
        self.file.release_pages(self.tensors[ours].theirs)

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary that came with the weights. Raises TokenizerError."""
        from glassllama.weights.tokenizer import tokenizer_from_folder
        from glassllama.weights.tokenizer_gguf import tokenizer_from_gguf

        gguf, rows = self.file_format == "gguf", self.config.vocab_size
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
        """The Jinja template that came with the weights, if any."""
        from glassllama.weights.tokenizer import chat_template_from_folder

        if self.file_format == "gguf":
            get = Fields("GGUF", self.file.metadata, TokenizerError)
            return get.text("tokenizer.chat_template", None)
        return chat_template_from_folder(self.folder)

    @cached_property
    def template_tokens(self) -> dict[str, str]:
        """The texts of the template's variables `bos_token`, `eos_token` and the like."""
        from glassllama.weights.tokenizer import template_tokens_from_folder
        from glassllama.weights.tokenizer_gguf import template_tokens_from_gguf

        if self.file_format == "gguf":
            return template_tokens_from_gguf(self.file.metadata)
        return template_tokens_from_folder(self.folder)

    @cached_property
    def sampling_defaults(self) -> SamplingDefaults:
        """The sampling settings that the files recommend. Raises ConfigError: a bad value."""
        gguf = self.file_format == "gguf"
        found = (
            defaults_from_gguf(self.file.metadata) if gguf else defaults_from_folder(self.folder)
        )
        self.notes.extend(found.notes)
        return found

    def close(self) -> None:
        self.file.close()
        if self.images is not None:
            self.images.file.close()


def open_checkpoint(path: Path | str, context_size: int | None = None) -> Checkpoint:
    """Open a GGUF file, a Hugging Face folder or a Meta folder (or a file in one).

    `context_size`: the tokens of the context, up to the longest one of the model. None: the usual
    one, which is the original one where RoPE follows from the context (dynamic NTK, LongRoPE).

    Raises GlassError: no such file, no known format, FormatError (damaged), ConfigError (not a
    supported model), WeightsError (tensors do not fit the configuration).
    """
    path = Path(path)
    try:
        return _open(*find_model(path), context_size)
    except MissingExtraError:
        raise
    except GlassError as error:
        folder = str(path if path.is_dir() else path.parent)
        if str(error).startswith((folder, str(path))):
            raise
        raise type(error)(f"{path}: {error}") from None


def longer_context(tokens: int, longest: int) -> str:
    return (
        f"the context is {tokens} tokens; one of up to {longest} can be chosen (--context-size N, "
        "context_size=N), with the RoPE for long texts"
    )


def _open(file_format: FileFormat, source: Path, context_size: int | None) -> Checkpoint:
    file, (config, notes), images = _read(file_format, source)
    if context_size is not None:
        config = with_context(config, context_size)
    elif (longest := getattr(config, "longest_context", 0)) > config.max_seq_len:
        notes = [*notes, longer_context(config.max_seq_len, longest)]
    architecture = architecture_of(config)
    match = match_tensors(file, architecture, config, file_format)
    notes = [*notes, *(hf_notes(source) if file_format == "hf" else []), *match.notes]
    if file_format == "gguf" and (second := find_mmproj(source)) is not None:
        try:
            images = gguf_images(OPEN["gguf"](second), match.config)
        except GlassError as error:  # the model reads texts without it
            notes.append(f"{second.name}: pictures are not read: {error}")
    if architecture.layer_plan is None:
        notes.append(architecture.torch_only)
    return Checkpoint(
        path=source, file_format=file_format, architecture=architecture, config=match.config,
        file=file, tensors=match.tensors, notes=notes, images=images,
    )  # fmt: skip


def _read(file_format: FileFormat, source: Path) -> tuple[TensorFile, Resolved, ImagePart | None]:
    """The decoder's tensors, its configuration, and the part for pictures, if there is one."""
    folder = source if source.is_dir() else source.parent
    if file_format != "hf":
        file = OPEN[file_format](source)
        if file_format == "gguf":
            return file, config_from_gguf(file), None
        return file, read_meta(read_json(folder / "params.json"), file), None
    # config.json before any other file: what it says explains most errors.
    values = read_json(folder / "config.json")
    if values.get("model_type") == "siglip":
        raise ConfigError(
            "config.json: model_type is 'siglip', which compares pictures with texts and is no "
            "language model: use 'glassllama classify', or glassllama.load in Python"
        )
    if (family := family_of(values)) is None:
        resolved = config_from_hf(values)
        return OPEN["hf"](source), resolved, None
    resolved = config_from_hf(text_values(values, family))
    decoder, images = split(OPEN["hf"](source), values, family, resolved.config)
    return decoder, resolved, images
