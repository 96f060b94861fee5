"""The files of a model: which ones a path means, in which format, and opening them.

GGUF           one .gguf file, or its parts
Hugging Face   config.json and .safetensors, one file or shards with an index
Meta           params.json and consolidated.NN.pth, one file or slices of every matrix
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import ConfigError, GlassError, WeightsError, join_names, named, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import Progress, TensorFile, TensorInfo
from glassllama.formats.gguf import open_gguf
from glassllama.formats.pth import PthFile, open_pth
from glassllama.formats.safetensors import open_safetensors, shard_names
from glassllama.formats.tensor_file import Container, format_of, formats_in
from glassllama.weights.architectures import hf_architecture
from glassllama.weights.architectures.description import FileFormat

GGUF_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)
SHARD = re.compile(r"consolidated\.([0-9][0-9])\.[^.]+", re.IGNORECASE)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
ADAPTER = "adapter_config.json"  # of PEFT: changes to the weights of another model
ADAPTER_ONLY = (
    "without a model: an adapter only changes the weights of another; merge both with PEFT's "
    "merge_and_unload, and save the result"
)
LARGEST_JSON = 1 << 24  # bytes; configurations are far smaller


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError: not a regular file, too large, no object."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: is not a regular file")  # a pipe might never end
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


# --- which files ----------------------------------------------------------------------------


def find_model(path: Path) -> tuple[FileFormat, Path]:
    """The format of the model at this path, and the file or folder to open. Raises GlassError."""
    if path.is_file():
        return _find_by_file(path)
    if not path.exists():
        raise GlassError(f"{path}: no such file or folder")
    if not path.is_dir():
        raise GlassError(f"{path}: neither a regular file nor a folder")
    containers = formats_in(path)
    has_config, safetensors = (path / "config.json").exists(), _model_safetensors(containers)
    if has_config and any(file.suffix.lower() == ".safetensors" for file in safetensors):
        return "hf", path
    meta_folders = [f for f in (path, path / "original") if (f / "params.json").exists()]
    for folder in meta_folders:
        if _meta_files(folder):
            return "meta", folder
    models = [
        file for file in _all_of(containers, "gguf")
        if file.is_file() and "mmproj" not in file.name.lower()  # llama.cpp's file for pictures
    ]  # fmt: skip
    firsts = [m for m in models if not (p := GGUF_PART.fullmatch(m.name)) or int(p[2]) == 1]
    if len(firsts) == 1:
        return "gguf", firsts[0]
    if firsts:
        raise GlassError(f"{path}: holds {len(firsts)} GGUF models, name one of them")
    if has_config and (safetensors or _index(path) is not None):
        return "hf", path
    if meta_folders:
        return "meta", meta_folders[0]  # opening it says what is missing
    raise _no_model(path, containers)


def _find_by_file(path: Path) -> tuple[FileFormat, Path]:
    """The same for a file: by its first bytes, whatever its name is."""
    try:
        container, folder = format_of(path), path.parent
    except OSError as error:
        raise GlassError(f"{path}: cannot be read: {error.strerror or error}") from None
    name = path.name.lower()
    if container == "gguf":
        return "gguf", path
    if container == "safetensors" or (container is None and name.endswith(INDEX_SUFFIX)):
        return "hf", _whole_model(path)
    if container is None and name.endswith("config.json"):
        return find_model(folder)
    if container is None:
        raise GlassError(f"{path}: not a .gguf, .safetensors or .pth file")
    if name.endswith(".pth") or (folder / "params.json").exists():
        return "meta", path
    raise GlassError(_is_pickle(path))


def _all_of(containers: Mapping[Path, Container], *kinds: Container) -> list[Path]:
    return [path for path, found in containers.items() if found in kinds]


def _model_safetensors(containers: Mapping[Path, Container]) -> list[Path]:
    """Safetensors files without those of an adapter; of the usual suffix, if there are any."""
    files = _all_of(containers, "safetensors")
    files = [file for file in files if not file.name.lower().startswith("adapter_model.")]
    return [file for file in files if file.suffix.lower() == ".safetensors"] or files


def _no_model(folder: Path, containers: Mapping[Path, Container]) -> GlassError:
    """The error for a folder without weights in a format that is read."""
    has_config = (folder / "config.json").exists()
    if has_config:  # an unsupported architecture first: saving its weights again would not help
        hf_architecture(read_json(folder / "config.json"))
    elif (folder / "settings.toml").is_file():
        return GlassError(
            f"{folder}: a training run that has saved no model yet; go on with it: glassllama "
            f"train {folder / 'settings.toml'} --out {folder} --resume auto"
        )
    if (folder / ADAPTER).exists():
        return GlassError(f"{folder}: {ADAPTER} {ADAPTER_ONLY}")
    if not has_config:
        return GlassError(
            f"{folder}: no model here (looked for *.gguf, config.json with *.safetensors, "
            "params.json with consolidated.*.pth)"
        )
    has_bin = any(path.suffix.lower() == ".bin" for path in folder.glob("*"))
    if has_bin or _all_of(containers, "zip", "pickle"):
        return GlassError(_is_pickle(folder))
    return GlassError(f"{folder}: config.json without *.safetensors; {_resave(folder)}")


def _is_pickle(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    return f"{path}: PyTorch's pickle files (torch.save) are not read here; {_resave(folder)}"


def _resave(folder: Path) -> str:
    """Two lines of Python that save the model as safetensors."""
    to = str(folder.absolute()) + "-safetensors"
    return (
        "save it as safetensors with these two lines of Python: "
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(folder)!r}).save_pretrained({to!r})"
    )


def _index(folder: Path) -> Path | None:
    """The folder's index of shards, or None."""
    indexes = sorted(p for p in folder.glob("*") if p.name.lower().endswith(INDEX_SUFFIX))
    if (folder / INDEX).exists():
        return folder / INDEX
    return indexes[0] if len(indexes) == 1 else None


def _safetensors(folder: Path) -> list[Path]:
    """The files of the folder's model; if an index lists them, the index first.

    As in transformers, model.safetensors is the model if the index does not name it.
    """
    single, index = folder / SINGLE, _index(folder)
    if index is not None:
        shards = shard_names(index)
        if SINGLE in shards or not single.is_file():
            return [index, *(folder / name for name in shards)]
    if single.is_file():
        return [single]
    return _model_safetensors(formats_in(folder))


def _whole_model(path: Path) -> Path:
    """The folder, index or file to open if the user names one file of a safetensors model."""
    if path in _safetensors(path.parent):
        return path.parent
    index = _index(path.parent)
    return index if index is not None and path.name in shard_names(index) else path


# --- Hugging Face ---------------------------------------------------------------------------


def hf_notes(source: Path) -> list[str]:
    """Notes on files that are not read: an adapter, an index beside model.safetensors."""
    folder, notes = source if source.is_dir() else source.parent, []
    index = _index(source) if source.is_dir() else None
    if index is not None and index not in _safetensors(source):
        notes.append(f"{SINGLE} is read, not the files that {named(index.name)} names")
    if (folder / ADAPTER).exists():
        notes.append(f"{ADAPTER}: the adapter beside the model is not applied; merge it first")
    return notes


def open_hf(source: Path) -> TensorFile:
    if source.is_file():
        return open_safetensors(source)
    files = _safetensors(source)
    if files[0] != _index(source) and len(files) != 1:
        raise GlassError(f"{source}: {len(files)} safetensors files, but no {INDEX}")
    return open_safetensors(files[0])


# --- Meta -----------------------------------------------------------------------------------


def _meta_files(folder: Path) -> list[Path]:
    """Meta's weights in a folder: consolidated.NN.*, else other .pth files, else any pickles."""
    files = _all_of(formats_in(folder), "zip", "pickle")
    shards = [file for file in files if SHARD.fullmatch(file.name)]
    named_pth = [file for file in files if file.suffix.lower() == ".pth"]
    both = [file for file in shards if file in named_pth]
    return sorted(both or shards or named_pth or files)


def open_meta(path: Path) -> TensorFile:
    """A .pth file, or all slices of a model as one file. Raises GlassError."""
    folder = path if path.is_dir() else path.parent
    dim = Fields("params.json", read_json(folder / "params.json")).integer("dim", 0)
    paths = _meta_files(folder)
    if path.is_file() and not (SHARD.fullmatch(path.name) and path in paths):
        paths = [path]  # one shard stands for all
    if not paths:
        raise GlassError(f"{folder}: params.json without any .pth file")
    first = paths[0].name
    if len(paths) > 1 and not (first.lower().endswith(".pth") or SHARD.fullmatch(first)):
        raise GlassError(f"{folder}: {len(paths)} files of PyTorch's, name one of them")
    for expected, shard in enumerate(paths):
        number = SHARD.fullmatch(shard.name)
        if number and int(number[1]) != expected:
            raise GlassError(f"{folder}: consolidated.{expected:02d}{shard.suffix} is missing")
    files = [open_pth(path) for path in paths]
    return files[0] if len(files) == 1 else MergedShards(files, dim)


BY_ROWS = (".wq.weight", ".wk.weight", ".wv.weight", ".w1.weight", ".w3.weight", "output.weight")
BY_COLUMNS = (".wo.weight", ".w2.weight")


class MergedShards:
    """Meta's model-parallel shards as one `TensorFile`: `read` joins the slices of a tensor.

    A matrix that was split by output rows is joined along axis 0, one split by input columns along
    axis 1; vectors are copies. `dim` is the model's width. Source: the parallel layers of Meta's
    published model code (column-parallel wq wk wv w1 w3 output, row-parallel wo w2).
    """

    def __init__(self, files: Sequence[PthFile], dim: int) -> None:
        self.files, self.dim, self.metadata = files, dim, files[0].metadata
        names = [set(file.names()) for file in files]
        if any(other != names[0] for other in names):
            apart = set[str]().union(*names) - names[0].intersection(*names)
            raise WeightsError(f"shards hold different tensors: {join_names(apart)}")

    def names(self) -> list[str]:
        return self.files[0].names()

    def axis(self, name: str) -> int | None:
        """The axis along which the slices of a tensor are joined; None: each is a full copy."""
        if name.endswith(BY_ROWS):
            return 0
        if name.endswith(BY_COLUMNS):
            return 1
        if name.startswith("tok_embeddings"):  # Llama 2 splits the width, Llama 3 the vocabulary
            return 0 if self.files[0].info(name).shape[-1] == self.dim else 1
        return None

    def info(self, name: str) -> TensorInfo:
        """The whole tensor's shape; path and offset are those of its first slice."""
        slices = [file.info(name) for file in self.files]
        first, axis = slices[0], self.axis(name)
        if len({(s.dtype, len(s.shape)) for s in slices}) > 1:
            raise WeightsError(f"{name} differs in type or rank from shard to shard")
        if axis is None:
            return first
        if len({s.shape[:axis] + s.shape[axis + 1 :] for s in slices}) > 1:
            shapes = quoted([s.shape for s in slices])
            raise WeightsError(f"{name}: slices {shapes} cannot be joined")
        joined = sum(s.shape[axis] for s in slices)
        shape = (*first.shape[:axis], joined, *first.shape[axis + 1 :])
        return replace(first, shape=shape, nbytes=sum(s.nbytes for s in slices))

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        axis = self.axis(name)
        if axis is None:
            return self.files[0].read(name, rows)
        if axis == 1:
            return np.concatenate([file.read(name, rows) for file in self.files], axis=1)
        start, stop, _ = (rows or slice(None)).indices(self.info(name).shape[0])
        parts, first = [], 0
        for file in self.files:  # from each shard the rows that it holds, maybe none
            parts.append(file.read(name, slice(max(start - first, 0), max(stop - first, 0))))
            first += file.info(name).shape[0]
        return np.concatenate(parts)

    def release_pages(self, name: str) -> None:
        for file in self.files:
            file.release_pages(name)

    def verify(self, progress: Progress | None = None) -> None:
        """Check the checksums of every shard. Raises FormatError naming the damaged tensor."""
        for done, file in enumerate(self.files, start=1):
            file.verify()
            if progress is not None:
                progress(done, len(self.files))

    def close(self) -> None:
        for file in self.files:
            file.close()


OPEN: dict[FileFormat, Callable[[Path], TensorFile]] = {
    "gguf": open_gguf,
    "hf": open_hf,
    "meta": open_meta,
}
