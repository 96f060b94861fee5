"""A model → a folder that `load` reads, and Hugging Face's own code where it knows the model.

    model.safetensors    the weights, under Hugging Face's names
    tokenizer.json …     the vocabulary
    config.json          the configuration: written last, because a folder without it is no model

Every file appears whole or not at all, and config.json is taken away before anything else changes.
So whenever the writer is stopped, the folder holds the new model, the old one, or none.
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
from torch import Tensor, nn

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import GlassError, TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.models.language_model import LanguageModel
from glassllama.tokenizers.chars import CharTokenizer, char_document
from glassllama.weights.architectures import architecture_of
from glassllama.weights.configs import llama_to_hf
from glassllama.weights.rows import Row
from glassllama.weights.tensor_map import foreign_names
from glassllama.weights.tokenizer import TOKENIZER_FILES

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
UNFINISHED = ".unfinished-"


def save_model(
    folder: Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    vocabulary: Path | None = None,
) -> None:
    """Write weights, configuration and tokenizer into `folder`, made if need be.

    A character tokenizer is written out; of any other kind the files are copied from `vocabulary`,
    the folder that it was read from. Raises GlassError: nowhere to write, disk full, another
    model's shards in the folder; ConfigError, TokenizerError: what the form has no words for.
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
    """A safetensors file that whoever may read other new files can read.

    Its own writer leaves it to the user alone, whatever the umask. Raises OSError, SafetensorError.
    """
    path.touch()
    mode = path.stat().st_mode  # what the umask, or the folder, makes of a new file
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(stat.S_IMODE(mode))


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under another name, force it to disk, and only then name it."""
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
    """config.json: the architecture's own keys, the number format, and where texts end."""
    config = model.config
    llama = isinstance(config, LlamaConfig)
    stops = sorted(tokenizer.stop_ids)
    return {
        **(llama_to_hf(config) if llama else architecture_of(config).config_to_hf(config)),
        "dtype": str(model.tok_embeddings.weight.dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
    }


def hf_tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The weights under Hugging Face's names, as they lie there."""
    assert isinstance(model, nn.Module)
    state = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    config = model.config
    if not isinstance(config, LlamaConfig):
        yield from rearranged(state, architecture_of(config).rows(config))
        return
    names = foreign_names("hf", config.n_layers)
    yield from ((names[ours], weight.contiguous()) for ours, weight in state.items())


def rearranged(state: Mapping[str, Tensor], rows: list[Row]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of rows.Rearranged: turned, joined, and zeros for what ours has not."""
    held: dict[str, list[Tensor]] = {}
    dtype = state["tok_embeddings.weight"].dtype
    for row in rows:
        mine = torch.zeros(row.shape, dtype=dtype) if row.zero else state[row.ours]
        parts = held.setdefault(row.theirs, [])
        parts.append(mine.T if row.transposed else mine)
        if len(parts) == row.parts:
            yield row.theirs, torch.cat(held.pop(row.theirs), dim=-1).contiguous()


# --- tokenizer ------------------------------------------------------------------------------


def tokenizer_files(
    tokenizer: Tokenizer, vocabulary: Path | None
) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """The files of a tokenizer, each with what writes it."""
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
    """tokenizer_config.json: what the control tokens are for."""
    begin, end, pad, unknown = tokenizer.specials
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.bos is not None,
        "bos_token": begin,
        "eos_token": end,
        "pad_token": pad,
        "unk_token": unknown,
    }
