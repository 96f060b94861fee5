"""Files of tiny models of all families, as documents and tensors that a test can change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from glassllama.formats.gguf import open_gguf
from semantic_mutants import as_json, gguf_bytes
from tiny_families import FAMILIES, GGUF_NAMES, family_model, write_family_gguf

# GGUF files of the other Mistrals, and of Llama, are read as those of a Llama.
IN_GGUF = [name for name in FAMILIES if not name.startswith(("mistral", "llama"))]


@dataclass(frozen=True)
class FamilyFile:
    """A model of a family: config.json or GGUF metadata, and its tensors by the file's names."""

    format: str
    values: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]

    def write(self, folder: Path, values: Mapping[str, Any], tensors: Any = None) -> Path:
        """A checkpoint with these values, and these tensors instead of the model's."""
        tensors = self.tensors if tensors is None else tensors
        if self.format == "gguf":
            path = folder / "tiny.gguf"
            path.write_bytes(gguf_bytes(values, tensors))
            return path
        (folder / "config.json").write_text(as_json(values))
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder

    def key(self, hf: str, gguf: str) -> str:
        """The name of a value in this format."""
        if self.format == "hf":
            return hf
        return f"{self.values['general.architecture']}.{gguf}"


@cache
def family_file(name: str, format: str) -> FamilyFile:
    """What transformers or the gguf package wrote."""
    model = family_model(name)
    with TemporaryDirectory() as place:
        folder = Path(place)
        if format == "hf":
            model.save_pretrained(folder)
            values = json.loads((folder / "config.json").read_text())
            return FamilyFile(format, values, load_file(folder / "model.safetensors"))
        architecture = FAMILIES[name]["model_type"]
        path = folder / "tiny.gguf"
        write_family_gguf(model, GGUF_NAMES.get(architecture, architecture), path)
        file = open_gguf(path)
        metadata = {key: plain(value) for key, value in file.metadata.items()}
        return FamilyFile(format, metadata, {name: file.read(name) for name in file.names()})


def plain(value: Any) -> Any:
    """A value of metadata as Python has it."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


BOTH = [(name, "hf") for name in FAMILIES] + [(name, "gguf") for name in IN_GGUF]
