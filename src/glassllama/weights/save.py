"""Save a model as a folder that `load` and transformers read.

    model.safetensors    the weights, under Hugging Face's names
    tokenizer.json …     the vocabulary
    config.json          the configuration: written last, because a folder without it is no model

Files are written under another name and then renamed, and config.json is removed before anything
else changes. So whenever the writer is stopped, the folder holds the new model, the old one, or
none.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from glassllama.base.errors import GlassError, TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.models.language_model import LanguageModel
from glassllama.tokenizers.chars import CharTokenizer, char_document
from glassllama.weights.architectures import architecture_of
from glassllama.weights.architectures.description import MappedTensor
from glassllama.weights.tokenizer import TOKENIZER_FILES

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
UNFINISHED = ".unfinished-"


def save_model(
    folder: Path, model: LanguageModel, tokenizer: Tokenizer, *, vocabulary: Path | None = None
) -> None:
    """Write weights, configuration and tokenizer into `folder`, which is created if necessary.

    A character tokenizer is written; files of other tokenizers are copied from `vocabulary`, the
    folder that they were read from. Raises GlassError: not writable, disk full, another model's
    shards in the folder; ConfigError, TokenizerError: the format cannot express something.
    """
    config = hf_config(model, tokenizer)
    tensors = dict(hf_tensors(model))
    files = dict(tokenizer_files(tokenizer, vocabulary))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX).exists():
            raise GlassError(f"{folder}: holds another model, in shards; save into another folder")
        for orphan in folder.glob(f"{UNFINISHED}*"):
            orphan.unlink()
        (folder / CONFIG).unlink(missing_ok=True)
        put(folder / WEIGHTS, lambda path: save_tensors(tensors, path, {"format": "pt"}))
        for name, write in files.items():
            put(folder / name, write)
        put(folder / CONFIG, writer_of(config))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GlassError(f"{folder}: the model cannot be saved ({reason})") from None


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of any new file.

    The library's own writer gives permissions to the user only, whatever the umask says. Raises
    OSError, SafetensorError.
    """
    path.touch()
    mode = path.stat().st_mode  # by the umask or the folder
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(stat.S_IMODE(mode))


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write the file under another name, flush it to disk, then rename it."""
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        write(unfinished)
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def writer_of(values: Mapping[str, Any]) -> Callable[[Path], object]:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


# --- configuration and weights --------------------------------------------------------------


def hf_config(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json: the architecture's own keys, the dtype, and the ids that begin and end texts."""
    stops = sorted(tokenizer.stop_ids)
    return {
        **architecture_of(model.config).config_to_hf(model.config),
        "dtype": str(model.tok_embeddings.weight.dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
    }


def hf_tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The weights under Hugging Face's names: the rules of the tensor map, inverted.

    Matrices that the format stores as one are stacked, transposed ones transposed again, and zeros
    are written for parameters that the model does not have.
    """
    weights = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    dtype = model.tok_embeddings.weight.dtype
    stored: dict[str, list[MappedTensor]] = {}
    for tensor in architecture_of(model.config).tensors(model.config, "hf"):
        stored.setdefault(tensor.theirs, []).append(tensor)
    for theirs, tensors in stored.items():
        parts = [
            torch.zeros(tensor.shape, dtype=dtype) if tensor.is_zero else weights[tensor.ours]
            for tensor in tensors
        ]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        whole = (whole.float() - 1).to(dtype) if tensors[0].less_one else whole
        yield theirs, (whole.T if tensors[0].transposed else whole).contiguous()


# --- tokenizer ------------------------------------------------------------------------------


def tokenizer_files(
    tokenizer: Tokenizer, vocabulary: Path | None
) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """The files of a tokenizer, each with the function that writes it."""
    if isinstance(tokenizer, CharTokenizer):
        yield "tokenizer.json", writer_of(char_document(tokenizer))
        yield "tokenizer_config.json", writer_of(char_settings(tokenizer))
        return
    found = [] if vocabulary is None else [vocabulary / name for name in TOKENIZER_FILES]
    found = [path for path in found if path.is_file()]
    if not found:
        raise TokenizerError(
            f"{vocabulary or 'vocabulary'}: no tokenizer files to copy; expected a folder with "
            f"{' or '.join(TOKENIZER_FILES[:2])}"
        )
    for path in found:
        yield path.name, lambda to, path=path: shutil.copyfile(path, to)  # type: ignore[misc]


def char_settings(tokenizer: CharTokenizer) -> dict[str, Any]:
    """tokenizer_config.json: the roles of the control tokens."""
    begin, end, pad, unknown = tokenizer.specials
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.bos is not None,
        "bos_token": begin,
        "eos_token": end,
        "pad_token": pad,
        "unk_token": unknown,
    }
