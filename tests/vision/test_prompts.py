"""Ids of prompts with pictures equal those of transformers' processors; text is never a picture."""

from __future__ import annotations

import itertools
import json
import string
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import tokenizers
from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.hf_json import tokenizer_from_json
from glassllama.vision import prompts
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

TEXT = (
    "What is in this picture?\n\nTwo red circles, and a blue square below.\n\n\n<row col img>" * 3
)
SPECIALS = ["<bos>", "<eos>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
MARKS = ["<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 5))]
USER_TEXTS = [
    "What is this?", "", " leading and trailing ", "\n", "two\n\nlines\n",
    "an <image> and <fake_token_around_image><global-img><row_1_col_1>", "<image>" * 3,
]  # fmt: skip
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}


def trained(specials: list[str], marks: list[str], *, marks_are_special: bool) -> Any:
    """A byte-level BPE that merges line breaks and parts of marks, with added tokens."""
    foreign = tokenizers.Tokenizer(models.BPE())
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    foreign.train_from_iterator([TEXT, string.printable, "<image>" * 9], trainer)
    foreign.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    added = [AddedToken(text, normalized=False, special=marks_are_special) for text in marks]
    foreign.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=foreign, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


def ours(foreign: Any) -> Any:
    tokenizer = tokenizer_from_json(json.loads(foreign.backend_tokenizer.to_str()))
    tokenizer.bos = tokenizer.specials["<bos>"]
    return tokenizer


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=[True, False], ids=["special marks", "plain marks"])
def idefics3(request: pytest.FixtureRequest) -> Idefics3Processor:
    tokenizer = trained(SPECIALS, MARKS, marks_are_special=request.param)
    return Idefics3Processor(Idefics3ImageProcessorPil(**TILES), tokenizer, image_seq_len=5)


@pytest.mark.parametrize(("width", "height", "grid"), [
    (64, 48, (3, 4)), (64, 10, (1, 4)), (10, 64, (4, 1)), (64, 64, (4, 4)),
])  # fmt: skip
def test_idefics3(idefics3: Any, width: int, height: int, grid: tuple[int, int]) -> None:
    """Rows and columns of which the vocabulary has no token are written as text."""
    tokenizer = ours(idefics3.tokenizer)
    parts = prompts.idefics3_parts(tokenizer, *grid, 5)
    texts = ("Before:", "\n\nbetween", "\n and after\n")
    expected = idefics3(
        text="<image>".join(texts), images=[picture(width, height)] * 2, add_special_tokens=False
    )["input_ids"][0]
    ids = prompts.encode_prompt(tokenizer, [texts[0], *parts, texts[1], *parts, texts[2]])
    assert ids == expected
    assert ids.count(prompts.image_id(tokenizer)) == 2 * (grid[0] * grid[1] + 1) * 5


def test_idefics3_picture_of_one_tile(idefics3: Any) -> None:
    single = Idefics3ImageProcessorPil(**TILES, do_image_splitting=False)
    processor = Idefics3Processor(single, idefics3.tokenizer, image_seq_len=7)
    expected = processor(text="a<image>\n", images=[picture(9, 9)], add_special_tokens=False)
    tokenizer = ours(idefics3.tokenizer)
    parts = prompts.idefics3_parts(tokenizer, 0, 0, 7)
    assert prompts.encode_prompt(tokenizer, ["a", *parts, "\n"]) == expected["input_ids"][0]


def test_chat_template_with_pictures(idefics3: Any) -> None:
    """A template writes one `<image>` per picture; it is expanded afterwards."""
    tokenizer = ours(idefics3.tokenizer)
    text = "<bos>User:<image>What is<image>this?<end_of_utterance>\nAssistant:"
    ids = tokenizer.encode(text, specials=True)
    image = prompts.image_id(tokenizer)
    grids = ((1, 4), (3, 4))
    pieces = [
        prompts.encode_prompt(tokenizer, prompts.idefics3_parts(tokenizer, *grid, 5))
        for grid in grids
    ]
    expected = idefics3(
        text=text, images=[picture(64, 10), picture(64, 48)], add_special_tokens=False
    )["input_ids"][0]
    assert prompts.expand_images(ids, image, pieces) == expected
    for wrong in ([], pieces[:1], [*pieces, pieces[0]]):
        with pytest.raises(TokenizerError, match="has 2 places for pictures, expected"):
            prompts.expand_images(ids, image, wrong)


@pytest.fixture(scope="module")
def paligemma() -> PaliGemmaProcessor:
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 9
    tokenizer = trained(["<bos>", "<eos>"], [], marks_are_special=False)
    return PaliGemmaProcessor(images, tokenizer)


@pytest.mark.parametrize("prompt", ["describe en\n", "detect cat ; dog", " x", "", "<loc0012>"])
@pytest.mark.parametrize("num_images", [1, 2])
def test_paligemma(paligemma: Any, prompt: str, num_images: int) -> None:
    tokenizer = ours(paligemma.tokenizer)
    images = [[picture(20, 30)] * num_images]
    expected = paligemma(text=["<image>" * num_images + prompt], images=images)["input_ids"][0]
    parts = prompts.paligemma_parts(tokenizer, prompt, 9, num_images)
    ids = prompts.encode_prompt(tokenizer, parts)
    assert ids == list(expected)
    assert ids.count(prompts.image_id(tokenizer)) == 9 * num_images


@pytest.mark.parametrize("special", [True, False])
def test_text_of_a_user_is_never_a_picture(special: bool) -> None:
    """Neither where files list the tokens as special nor where they are plain additions."""
    marks = ["<image>", "<fake_token_around_image>", *MARKS]
    foreign = trained(["<bos>", "<eos>"], marks, marks_are_special=special)
    tokenizer = ours(foreign)
    assert {*marks} <= {*(tokenizer.specials if special else tokenizer.added)}
    image_ids = {foreign.convert_tokens_to_ids(mark) for mark in marks}
    plain = [text for text in USER_TEXTS if text]
    for before, after in itertools.product(plain, plain):
        assert not image_ids & {*prompts.encode_prompt(tokenizer, [before, after])}
        parts = prompts.idefics3_parts(tokenizer, 2, 3, 4)
        ids = prompts.encode_prompt(tokenizer, [before, *parts, after])
        assert ids.count(prompts.image_id(tokenizer)) == (2 * 3 + 1) * 4
        assert tokenizer.decode(ids).startswith(before)
        assert tokenizer.decode(ids).endswith(after)
        ids = prompts.encode_prompt(tokenizer, prompts.paligemma_parts(tokenizer, before, 4))
        assert ids.count(prompts.image_id(tokenizer)) == 4


def test_texts_next_to_each_other_are_one_text(idefics3: Any) -> None:
    tokenizer = ours(idefics3.tokenizer)
    assert tokenizer.encode("\n\n") != tokenizer.encode("\n") * 2  # it is one token
    bos = tokenizer.bos
    assert prompts.encode_prompt(tokenizer, [bos, "a\n", "\n", "b", bos, "c"]) == [
        bos, *tokenizer.encode("a\n\nb"), bos, *tokenizer.encode("c")
    ]  # fmt: skip
    assert prompts.encode_prompt(tokenizer, []) == []


def test_vocabularies_without_the_tokens() -> None:
    tokenizer = ours(trained(["<bos>", "<eos>"], [], marks_are_special=False))
    with pytest.raises(TokenizerError, match="no token <image>: this model reads no pictures"):
        prompts.image_id(tokenizer)
    with pytest.raises(TokenizerError, match="no token <fake_token_around_image>"):
        prompts.idefics3_parts(tokenizer, 0, 0, 1)
    tokenizer.bos = None
    with pytest.raises(TokenizerError, match="no bos token"):
        prompts.paligemma_parts(tokenizer, "x", 1)
