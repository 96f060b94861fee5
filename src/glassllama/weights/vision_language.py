"""Checkpoints of vision-language models: a decoder and a vision tower in one folder.

The decoder is opened as if it were alone: its part of config.json, and its tensors under their
usual names. So the engine and the reference run it like any other. The tower and its projection
are loaded from the same files by `ImagePart`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from glassllama.base.errors import WeightsError, join_names
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile, TensorInfo

Prefixes = Mapping[str, str]  # of names in a file → of our own, the longest first


@dataclass(frozen=True, kw_only=True)
class VisionLanguage:
    """How a family is stored: its names in config.json, and the prefixes of its two parts."""

    title: str
    hf_class: str
    text_type: str  # the model_type of a text_config that does not say it
    decoder: Prefixes
    images: Prefixes  # of the tower, whose names follow weights/vision.py, and the projection


PALIGEMMA = VisionLanguage(
    title="PaliGemma",
    hf_class="PaliGemmaForConditionalGeneration",
    text_type="gemma",
    decoder={
        "language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.", "lm_head.": "lm_head.",
    },
    images={
        f"{outer}{theirs}": ours
        for outer in ("model.", "")
        for theirs, ours in {
            "vision_tower.vision_model.": "tower.", "vision_tower.": "tower.",
            "multi_modal_projector.linear.": "projector.",
        }.items()
    },
)  # fmt: skip
IDEFICS3 = VisionLanguage(
    title="Idefics3",
    hf_class="Idefics3ForConditionalGeneration",
    text_type="llama",
    decoder={"model.text_model.": "model.", "lm_head.": "lm_head."},
    images={
        "model.vision_model.": "tower.",
        "model.connector.modality_projection.proj.": "connector.",
    },
)
SMOLVLM = replace(IDEFICS3, title="SmolVLM", hf_class="SmolVLMForConditionalGeneration")
FAMILIES = {"paligemma": PALIGEMMA, "idefics3": IDEFICS3, "smolvlm": SMOLVLM}
# Keys of a text_config that are not those of a decoder alone.
OUTSIDE_TEXT = ("architectures", "num_image_tokens", "use_bidirectional_attention")


def family_of(values: Mapping[str, Any]) -> VisionLanguage | None:
    """The family of a config.json; None for models that read no pictures."""
    return FAMILIES.get(Fields("config.json", values).text("model_type", ""))


def text_values(values: Mapping[str, Any], family: VisionLanguage) -> dict[str, Any]:
    """The config.json that the decoder would have alone. Raises ConfigError."""
    text = Fields("config.json", values).object("text_config")
    found = {key: value for key, value in text.values.items() if key not in OUTSIDE_TEXT}
    found.setdefault("model_type", family.text_type)
    if family is not PALIGEMMA and "tie_word_embeddings" in values:
        found["tie_word_embeddings"] = values["tie_word_embeddings"]
    return found


class PartOfFile:
    """Some of the tensors of a file under other names: those that begin with one of `prefixes`."""

    def __init__(self, file: TensorFile, prefixes: Prefixes) -> None:
        self._file, self._names = file, dict[str, str]()
        for name in file.names():
            prefix = next((one for one in prefixes if name.startswith(one)), None)
            if prefix is not None:
                self._names[prefixes[prefix] + name.removeprefix(prefix)] = name

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._file.metadata

    def names(self) -> list[str]:
        return [*self._names]

    def info(self, name: str) -> TensorInfo:
        return self._file.info(self._names[name])

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        return self._file.read(self._names[name], rows)

    def release_pages(self, name: str) -> None:
        self._file.release_pages(self._names[name])

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class ImagePart:
    """What a checkpoint has for pictures; weights/vision.py loads it."""

    family: VisionLanguage
    values: Mapping[str, Any]  # of config.json
    text: Any  # the decoder's configuration
    file: TensorFile


def split(
    file: TensorFile, values: Mapping[str, Any], family: VisionLanguage, text: Any
) -> tuple[TensorFile, ImagePart]:
    """A file -> the decoder's tensors, and the part for pictures.

    Raises WeightsError for tensors of neither, ConfigError if the configuration has no tower.
    """
    Fields("config.json", values).object("vision_config")
    prefixes = (*family.decoder, *family.images)
    if unexpected := [name for name in file.names() if not name.startswith(prefixes)]:
        raise WeightsError(f"tensors of neither tower nor decoder: {join_names(unexpected)}")
    images = PartOfFile(file, family.images)
    return PartOfFile(file, family.decoder), ImagePart(family, values, text, images)
