"""The ids that stand for a picture in a prompt; a user's text never contains them.

Each `<image>` id is replaced by one feature of the picture when the model runs. Sources:
transformers 5.24, Idefics3Processor, SmolVLMProcessor and PaliGemmaProcessor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer

Part = str | int  # text, or the id of a special token

IMAGE, BEFORE, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
IMAGE_TOKEN = re.compile(r"<image>|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>")


def image_id(tokenizer: Tokenizer) -> int:
    """The id of `<image>`. Raises TokenizerError: the vocabulary has none."""
    return _token_id(tokenizer, IMAGE)


def idefics3_parts(tokenizer: Tokenizer, rows: int, cols: int, image_seq_len: int) -> list[Part]:
    """The parts that stand for one picture of Idefics3, SmolVLM or SmolVLM2.

    Each tile is a mark of its position and `image_seq_len` times `<image>`; a line break ends a
    row, a blank line comes before the whole picture. A picture that is not split (0 rows and
    columns) is only the whole picture. Raises TokenizerError: a token is not in the vocabulary.
    """
    before = _token_id(tokenizer, BEFORE)
    images = [image_id(tokenizer)] * image_seq_len
    parts: list[Part] = []
    for row in range(1, rows + 1):
        for col in range(1, cols + 1):
            parts += [before, _mark(tokenizer, f"<row_{row}_col_{col}>"), *images]
        parts.append("\n" if row < rows else "\n\n")
    return [*parts, before, _mark(tokenizer, WHOLE), *images, before]


def paligemma_parts(
    tokenizer: Tokenizer, prompt: str, image_seq_len: int, num_images: int = 1,
    bos: int | None = None,
) -> list[Part]:  # fmt: skip
    """The prompt of PaliGemma: all `<image>` ids, bos, the text, a line break.

    `bos`: None for the one that the tokenizer puts before texts. Raises TokenizerError: the
    vocabulary has no `<image>` or no bos.
    """
    bos = tokenizer.bos if bos is None else bos
    if bos is None:
        raise TokenizerError("the vocabulary has no bos token, which PaliGemma's prompts need")
    return [*[image_id(tokenizer)] * (image_seq_len * num_images), bos, f"{prompt}\n"]


def encode_prompt(tokenizer: Tokenizer, parts: Iterable[Part]) -> list[int]:
    """The ids of texts and special ids in order.

    Texts next to each other are one text. No text becomes an image token, even if the vocabulary
    lists such a token as a plain addition. Raises TokenizerError.
    """
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    plain = tokenizer.without_added(filter(IMAGE_TOKEN.fullmatch, tokenizer.added))
    return plain.encode_parts(joined)


def expand_images(ids: Sequence[int], image: int, pictures: Sequence[Sequence[int]]) -> list[int]:
    """Replace each id `image`, as a chat template writes it, by the ids of the next picture.

    Raises TokenizerError: the prompt has another number of places than there are pictures.
    """
    if (places := ids.count(image)) != len(pictures):
        raise TokenizerError(
            f"prompt: has {places} places for pictures, expected {len(pictures)}, one per picture"
        )
    following = iter(pictures)
    return [new for id in ids for new in (next(following) if id == image else (id,))]


def _mark(tokenizer: Tokenizer, text: str) -> Part:
    """The id of a mark; its text, as in transformers, where the vocabulary lacks the token."""
    return tokenizer.specials.get(text, tokenizer.added.get(text, text))


def _token_id(tokenizer: Tokenizer, text: str) -> int:
    found = _mark(tokenizer, text)
    if isinstance(found, str):
        raise TokenizerError(f"the vocabulary has no token {text}: this model reads no pictures")
    return found
