"""Pictures in prompts: a file → rows that a decoder reads, and the ids that stand for them.

A row's id follows from the content of its picture (base.interfaces.row_ids), so keys and values of
two different pictures are never shared. Rows are kept by content: a second question about the same
picture needs no second run of the vision tower.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import ConfigError, GenerationError, MissingExtraError, quoted
from glassllama.base.fields import Fields
from glassllama.base.interfaces import Tokenizer, row_ids
from glassllama.tokenizers.chat import Message
from glassllama.tokenizers.unigram import read_siglip_tokenizer
from glassllama.vision.images import ImageSource
from glassllama.vision.processing import (
    ImageProcessor,
    ProcessedImage,
    image_processor,
    read_image_processor,
)
from glassllama.vision.prompts import (
    encode_prompt,
    expand_images,
    idefics3_parts,
    image_id,
    paligemma_parts,
)
from glassllama.weights.checkpoint import Checkpoint
from glassllama.weights.model_files import read_json

# What is asked about a picture if nothing is: a question, and PaliGemma's task for it.
DESCRIBE, CAPTION = "Can you describe this image?", "caption en"
CACHED_PICTURES = 16  # pictures whose rows are kept
Row = NDArray[np.float32]  # (C,)


@dataclass(frozen=True)
class Picture:
    """What a decoder reads of a picture: `rows` (R, C), in the order of its placeholders."""

    processed: ProcessedImage
    rows: NDArray[np.float32]

    @cached_property
    def ids(self) -> list[int]:
        return row_ids(self.processed.digest, len(self.rows))


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt with pictures: `ids` of the vocabulary, with a placeholder for every row.

    `keys` are the same with a negative id for each row, `rows` the vectors of these. `prefix`: all
    tokens see each other.
    """

    ids: list[int]
    keys: list[int]
    rows: Mapping[int, Row]
    prefix: bool


class ImageReader:
    """The vision tower of a checkpoint and what goes with it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises ConfigError: a text model, or settings that are not implemented."""
        if checkpoint.images is None:
            raise ConfigError(f"{checkpoint.path.name} reads no pictures: it is a text model")
        self._checkpoint, self._images = checkpoint, checkpoint.images
        self._rows: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    @cached_property
    def processor(self) -> ImageProcessor:
        values = self._images.processor
        if values is None:
            return read_image_processor(self._checkpoint.folder)
        return image_processor(Fields("GGUF", values))

    @cached_property
    def model(self) -> Any:
        """The tower and its projection, loaded on first use. Raises MissingExtraError."""
        return vision_module().load_images(self._images)

    def read(self, source: ImageSource) -> Picture:
        """A picture (see vision.images.ACCEPTED). Raises FormatError, MissingExtraError."""
        processed = self.processor(source)
        rows = self._rows.get(processed.digest)
        if rows is None:
            found = vision_module().run(self.model, processed.pixels)  # (N, R, C)
            rows = found.reshape(-1, found.shape[-1])  # (N · R, C)
        self._rows[processed.digest] = rows
        self._rows.move_to_end(processed.digest)
        while len(self._rows) > CACHED_PICTURES:
            self._rows.popitem(last=False)
        return Picture(processed, rows)

    @property
    def has_prefix(self) -> bool:
        """Whether pictures stand before the prompt and see it: PaliGemma's form."""
        return bool(self.model.config.prefix)

    def question(self, tokenizer: Tokenizer, text: str, picture: Picture) -> ImagePrompt:
        """PaliGemma's prompt; without a text the task to describe. Raises TokenizerError."""
        named = self._checkpoint.template_tokens.get("bos_token", "")  # also if none is put first
        bos = tokenizer.specials.get(named)
        parts = paligemma_parts(tokenizer, text or CAPTION, len(picture.rows), bos=bos)
        ids = encode_prompt(tokenizer, parts)
        return self._prompt(tokenizer, ids, [picture])

    def expand(
        self, tokenizer: Tokenizer, ids: Sequence[int], pictures: Sequence[Picture]
    ) -> ImagePrompt:
        """The ids of a chat with one placeholder for each picture -> with all of their marks.

        Raises TokenizerError: another number of placeholders.
        """
        count = self.model.config.rows_of_tile
        parts = [
            encode_prompt(
                tokenizer, idefics3_parts(tokenizer, one.processed.rows, one.processed.cols, count)
            )
            for one in pictures
        ]
        return self._prompt(
            tokenizer, expand_images(ids, image_id(tokenizer), parts), list(pictures)
        )

    def _prompt(self, tokenizer: Tokenizer, ids: list[int], pictures: list[Picture]) -> ImagePrompt:
        placeholder = image_id(tokenizer)
        following = iter([id for picture in pictures for id in picture.ids])
        keys = [next(following) if id == placeholder else id for id in ids]
        rows = {id: row for one in pictures for id, row in zip(one.ids, one.rows, strict=True)}
        return ImagePrompt(ids, keys, rows, self.has_prefix)


# --- SigLIP -----------------------------------------------------------------------------------

# What language models have and this one has not: asked for, it is an error of one line.
OF_LANGUAGE_MODELS = frozenset(
    "chat chat_format checkpoint describe encode encode_chat executor generate generate_batch "
    "logits sampling_defaults specials_in stream stream_batch stream_chat stream_description "
    "trace".split()
)


def is_siglip(path: Path) -> bool:
    """Whether a path is a folder of SigLIP, or a file in one."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "siglip"


class ImageTextModel:
    """A loaded SigLIP: how well texts describe pictures.

    Pictures are those of `LLM.embed_image`, one or a list; texts one or a list.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        """Raises GlassError: files that are missing or damaged, MissingExtraError."""
        self.path = path if path.is_dir() else path.parent
        self.name, self.notes = name or self.path.name, list[str]()
        self.processor = read_image_processor(self.path)
        self._vision = vision_module()
        self.model = self._vision.load_siglip(self.path)
        length = self.model.config.text.max_seq_len
        self.tokenizer = read_siglip_tokenizer(self.path / "spiece.model", length)

    def embed_image(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """(B, E) float32, of length 1. Raises FormatError."""
        sources: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        pixels = np.concatenate([self.processor(source).pixels for source in sources])
        embeddings: NDArray[np.float32] = self._vision.run(self.model.embed_image, pixels)
        return embeddings

    def embed_text(self, texts: str | Sequence[str]) -> NDArray[np.float32]:
        """(N, E) float32, of length 1. Raises TokenizerError."""
        ids = self.tokenizer.encode_batch([texts] if isinstance(texts, str) else texts)
        embeddings: NDArray[np.float32] = self._vision.run(self.model.embed_text, ids)
        return embeddings

    def scores(
        self, images: ImageSource | Sequence[ImageSource], texts: str | Sequence[str]
    ) -> NDArray[np.float32]:
        """(B, N) probabilities that a text describes a picture, each by itself."""
        pairs = self.embed_image(images), self.embed_text(texts)
        logits: NDArray[np.float32] = self._vision.run(self.model.logits, *pairs)
        return (1 / (1 + np.exp(-logits))).astype(np.float32)

    def __getattr__(self, name: str) -> Any:
        if name in OF_LANGUAGE_MODELS:
            raise ConfigError(
                f"{self.path}: a SigLIP compares pictures with texts and writes none: use "
                "'glassllama classify', or embed_image, embed_text and scores"
            )
        raise AttributeError(name)

    def close(self) -> None:
        """Nothing stays open."""


def vision_module() -> Any:
    """weights/vision.py, which loads and runs towers and needs PyTorch."""
    try:
        return import_module("glassllama.weights.vision")
    except ImportError:
        raise MissingExtraError("reading pictures", "vision") from None


# --- pictures in the messages of a chat -------------------------------------------------------


def split_pictures(messages: Any) -> tuple[Any, list[ImageSource]]:
    """Messages with `{"type": "image"}` where a picture was, and the pictures in order.

    Raises GenerationError for a part of that type without exactly one source.
    """
    sources: list[ImageSource] = []

    def part_of(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") != "image":
            return part
        if len(part) != 2 or not {"path", "image"} & {*part}:
            raise GenerationError(
                f"image: expected {{'type': 'image', 'path': FILE}} or 'image', got {quoted(part)}"
            )
        sources.append(part.get("path", part.get("image")))
        return {"type": "image"}

    def message_of(message: Any) -> Any:
        is_message = isinstance(message, Message)
        fields = vars(message) if is_message else message if isinstance(message, Mapping) else {}
        content = fields.get("content")
        if not isinstance(content, list | tuple):
            return message
        parts = [part_of(part) for part in content]
        return replace(message, content=parts) if is_message else {**message, "content": parts}

    if not isinstance(messages, list | tuple):
        return messages, sources
    return [message_of(message) for message in messages], sources


def question_about(image: ImageSource, text: str) -> list[dict[str, Any]]:
    """The messages of a chat that asks about a picture."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": text or DESCRIBE}]
    return [{"role": "user", "content": parts}]


def as_parts(messages: Any) -> Any:
    """Every content as a list of parts, which templates of models with pictures expect."""

    def in_parts(content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    if isinstance(messages, str):
        return [Message("user", in_parts(messages))]
    return [
        replace(message, content=in_parts(message.content))
        if isinstance(message, Message)
        else {**message, "content": in_parts(message.get("content"))}
        for message in messages
    ]
