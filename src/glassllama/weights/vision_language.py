"""Checkpoints of vision-language models: a decoder and a vision tower in one folder.

The decoder is opened as if it were alone: its part of config.json, and its tensors under their
usual names. So the engine and the reference run it like any other. The tower and its projection
are loaded from the same files by `ImagePart`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from glassllama.base.errors import ConfigError, WeightsError, join_names, quoted
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
    """Some of the tensors of a file under other names: `rename` gives None for the others."""

    def __init__(self, file: TensorFile, rename: Callable[[str], str | None]) -> None:
        names = {name: rename(name) for name in file.names()}
        self._file = file
        self._names = {ours: name for name, ours in names.items() if ours is not None}

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


def without_prefix(prefixes: Prefixes, name: str) -> str | None:
    """A name with the prefix that it has replaced; None if it has none of them."""
    prefix = next((one for one in prefixes if name.startswith(one)), None)
    return None if prefix is None else prefixes[prefix] + name.removeprefix(prefix)


@dataclass(frozen=True)
class ImagePart:
    """What a checkpoint has for pictures; weights/vision.py loads it.

    `processor` is the object of a preprocessor_config.json; None: that file of the folder.
    """

    family: VisionLanguage
    values: Mapping[str, Any]  # of config.json
    text: Any  # the decoder's configuration
    file: TensorFile
    processor: Mapping[str, Any] | None = None


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
    images = PartOfFile(file, partial(without_prefix, family.images))
    decoder = PartOfFile(file, partial(without_prefix, family.decoder))
    return decoder, ImagePart(family, values, text, images)


# --- GGUF: a second file, mmproj-….gguf ---------------------------------------------------------

MMPROJ = "mmproj"  # in the names of these files
PROJECTOR = "clip.projector_type"
# llama.cpp's names, without .weight and .bias → those of Hugging Face's Idefics3, in our parts.
GGUF_NAMES = {
    "v.patch_embd": "tower.embeddings.patch_embedding",
    "v.position_embd": "tower.embeddings.position_embedding",
    "v.post_ln": "tower.post_layernorm", "mm.model.fc": "connector", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1", "ln2": "layer_norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip
IN_BLOCK = re.compile(r"v\.blk\.([0-9]+)\.(.+)")


def gguf_rename(name: str) -> str:
    """A name of Idefics3 for llama.cpp's; unknown ones stay, and are listed as unexpected."""
    stem, _, kind = name.rpartition(".")
    block = IN_BLOCK.fullmatch(stem)
    if block is not None and block[2] in GGUF_NAMES:
        return f"tower.encoder.layers.{block[1]}.{GGUF_NAMES[block[2]]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}" if stem in GGUF_NAMES else name


def find_mmproj(path: Path) -> Path | None:
    """The file for pictures in the folder of a GGUF model, if there is exactly one."""
    found = [p for p in path.parent.glob("*.gguf") if MMPROJ in p.name.lower() and p != path]
    return found[0] if len(found) == 1 else None


def gguf_images(file: TensorFile, text: Any) -> ImagePart:
    """The part for pictures of llama.cpp's second file. Raises ConfigError naming the field."""
    get = Fields("GGUF", file.metadata)
    kind = get.text(PROJECTOR, get.text("clip.vision.projector_type", ""))
    if kind != "idefics3":
        raise ConfigError(f"{PROJECTOR} is {quoted(kind)}, only idefics3 is supported")
    size = get.integer("clip.vision.image_size")
    vision = {
        theirs: get.integer(f"clip.vision.{key}")
        for theirs, key in {
            "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
            "image_size": "image_size", "patch_size": "patch_size",
        }.items()
    }  # fmt: skip
    values = {
        "vision_config": {
            **vision, "layer_norm_eps": get.number("clip.vision.attention.layer_norm_epsilon"),
        },
        "scale_factor": get.integer("clip.vision.projector.scale_factor"),
    }  # fmt: skip
    processor = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": get.integer("clip.vision.preproc_image_size", 4 * size)},
        "max_image_size": {"longest_edge": size},
        **{
            theirs: [*map(float, get.items(f"clip.vision.{theirs}", of="number"))]
            for theirs in ("image_mean", "image_std")
        },
    }
    return ImagePart(IDEFICS3, values, text, PartOfFile(file, gguf_rename), processor)
