"""Pictures from files to answers: ids, features and greedy answers equal those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import PaliGemmaProcessor, SiglipModel, SiglipProcessor, SiglipTokenizer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from glassllama import LLM, load
from glassllama.base.errors import ConfigError, FormatError, GenerationError, TokenizerError
from glassllama.pictures import ImageTextModel
from parity.test_siglip import their_model as siglip_model
from parity.test_vision_language import MODELS, their_model
from tolerances import difference, logits_tolerance
from vision.test_prompts import MARKS, SPECIALS, TILES, picture, trained

TEMPLATE = (
    "<bos>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
ROMEO = (Path(__file__).parent / "romeo_and_juliet.txt").read_text(encoding="utf-8")
QUESTION = "What is left of the circle?"
pytestmark = pytest.mark.usefixtures("one_thread")


def write(name: str, folder: Path) -> Any:
    """A tiny model with its processor, as transformers saves them -> their processor."""
    tokenizer = trained(SPECIALS, MARKS, marks_are_special=True)
    size, image = len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    kind, text, rest, tower = MODELS[name]
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    text = {**text, "vocab_size": size, **ends}
    MODELS["in this test"] = (kind, text, {**rest, "image_token_id": image,
                                           "image_token_index": image}, tower)  # fmt: skip
    try:
        their_model("in this test").save_pretrained(folder)
    finally:
        del MODELS["in this test"]
    side = tower.get("image_size", 28)
    if kind == "paligemma":
        pictures = SiglipImageProcessorPil(size={"height": side, "width": side})
        pictures.image_seq_length = 16
        processor = PaliGemmaProcessor(pictures, tokenizer)
    else:
        tiles = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
        pictures = Idefics3ImageProcessorPil(**{**TILES, **tiles})
        rows = (side // tower.get("patch_size", 7) // rest["scale_factor"]) ** 2
        processor = Idefics3Processor(
            pictures, tokenizer, image_seq_len=rows, chat_template=TEMPLATE
        )
    processor.save_pretrained(folder)
    return processor


@pytest.fixture(scope="module", params=["paligemma", "paligemma2", "idefics3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, Any]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return folder, write(request.param, folder)


@pytest.fixture(scope="module")
def llm(tiny: tuple[Path, Any]) -> LLM:
    return load(tiny[0], exact=True)


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(processor: Any, image: Image.Image, llm: LLM) -> Any:
    if llm.images.has_prefix:
        text = "<image>" + QUESTION
        inputs = processor(images=image, text=text, return_tensors="np")
        del inputs["labels"]
        return {name: torch.from_numpy(np.asarray(values)) for name, values in inputs.items()}
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=[image], text=text, return_tensors="np")
    return {name: torch.from_numpy(np.asarray(values)) for name, values in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("size", [(28, 28), (60, 33), (20, 90)])
def test_ids_and_greedy_answers(tiny: tuple[Path, Any], llm: LLM, size: tuple[int, int]) -> None:
    folder, processor = tiny
    image, model = picture(*size), theirs(folder)
    inputs = inputs_of(processor, image, llm)
    answer = llm.describe(image, QUESTION, max_tokens=12, ignore_eos=True, temperature=0)
    ids = inputs["input_ids"][0].tolist()
    assert answer.prompt_ids == ids
    for id in answer.ids:  # the id that they find most likely, or one as near as the tolerance
        logits = model(**{**inputs, "input_ids": torch.tensor([ids])}).logits[0, -1]
        best = float(logits.max() - logits[id])
        allowed = 4 * logits_tolerance(llm.checkpoint.config) * float(logits.abs().max())
        assert best <= allowed
        ids.append(id)
        if "token_type_ids" in inputs:
            zero = inputs["token_type_ids"]
            inputs["token_type_ids"] = torch.cat([zero, torch.ones(1, 1, dtype=zero.dtype)], 1)
        inputs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)


@torch.no_grad()
def test_features(tiny: tuple[Path, Any], llm: LLM) -> None:
    folder, processor = tiny
    image, model = picture(60, 33), theirs(folder)
    inputs = inputs_of(processor, image, llm)
    found = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    features = torch.cat(list(found)).flatten(0, -2)
    vision = llm.images.model.config.vision
    assert difference(llm.embed_image(image), features) <= logits_tolerance(vision)


def test_every_form_of_a_picture(llm: LLM, tmp_path: Path) -> None:
    image = picture(60, 33)
    image.save(tmp_path / "p.png")
    rows = llm.embed_image(image)
    for source in (tmp_path / "p.png", str(tmp_path / "p.png"), (tmp_path / "p.png").read_bytes(),
                   np.asarray(image)):  # fmt: skip
        assert np.array_equal(llm.embed_image(source), rows)
    pixels = llm.images.processor(image).pixels[-1]
    single = llm.embed_image(pixels)  # a preprocessed array (3, H, W)
    assert np.allclose(single, rows[-len(single) :], atol=1e-5)


def test_a_second_question_runs_no_tower(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    first = llm.describe(picture(28, 28), QUESTION, max_tokens=5, temperature=0)
    monkeypatch.setattr(llm.images.model, "forward", lambda *_: pytest.fail("the tower runs again"))
    again = llm.describe(picture(28, 28), QUESTION, max_tokens=5, temperature=0)
    assert again.ids == first.ids
    other = llm.describe(picture(28, 28), "And what is right of it?", max_tokens=5, temperature=0)
    assert other.prompt_ids != first.prompt_ids


def test_another_picture_shares_nothing(llm: LLM) -> None:
    """The same text and size, so the placeholders are equal, and the answers are those alone."""
    black, noise = Image.new("RGB", (28, 28)), picture(28, 28)
    alone = {}
    for name, image in (("black", black), ("noise", noise)):
        with load(llm.path, exact=True) as fresh:
            alone[name] = fresh.describe(image, QUESTION, max_tokens=8, ignore_eos=True).ids
    for name, image in (("noise", noise), ("black", black), ("noise", noise)):
        found = llm.describe(image, QUESTION, max_tokens=8, ignore_eos=True)
        assert found.ids == alone[name]


def test_image_tokens_in_a_text_are_text(llm: LLM) -> None:
    image, text = picture(28, 28), "is <image> a <fake_token_around_image><global-img> picture?"
    answer = llm.describe(image, text, max_tokens=1)
    placeholder = llm.tokenizer.specials["<image>"]
    assert answer.prompt_ids.count(placeholder) == len(llm.embed_image(image))


def test_chats(llm: LLM) -> None:
    if llm.images.has_prefix:
        pytest.skip("PaliGemma has no chat")
    one = {"type": "image", "image": picture(28, 28)}
    two = {"type": "image", "image": picture(60, 33)}
    messages = [
        {"role": "user", "content": [one, {"type": "text", "text": "And this?"}, two]},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Only a text"},
    ]
    answer = llm.chat(messages, max_tokens=3)
    count = sum(len(llm.embed_image(each["image"])) for each in (one, two))
    assert answer.prompt_ids.count(llm.tokenizer.specials["<image>"]) == count
    plain = llm.chat("Hello", max_tokens=3)
    assert "Hello" in llm.tokenizer.decode(plain.prompt_ids)
    for wrong, words in (
        ({"type": "image"}, "expected .*path"),
        ({"type": "image", "path": "a", "image": 1}, "path"),
    ):
        with pytest.raises(GenerationError, match=words):
            llm.chat([{"role": "user", "content": [wrong]}])
    with pytest.raises((GenerationError, TokenizerError), match="expected"):
        llm.chat([{"role": "user", "content": [{"type": "video", "path": "a"}]}])


def test_bad_pictures(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"GIF89a" + b"x" * 30)
    for wrong in (tmp_path / "no.png", tmp_path / "missing.png", tmp_path, b"text",
                  "https://example.org/cat.png"):  # fmt: skip
        with pytest.raises(FormatError):
            llm.describe(wrong, QUESTION)


def test_a_text_model_reads_no_pictures(default_model: Path) -> None:
    with load(default_model) as llm, pytest.raises(ConfigError, match="it is a text model"):
        llm.describe(picture(8, 8))


def test_both_backends(tiny: tuple[Path, Any], llm: LLM) -> None:
    with load(tiny[0], backend="torch") as other:
        image = picture(60, 33)
        logits = [
            each.describe(image, QUESTION, max_tokens=6, ignore_eos=True, logprobs=0, temperature=0)
            for each in (llm, other)
        ]
    assert logits[0].prompt_ids == logits[1].prompt_ids
    first = [one.logprobs[0].logprob for one in logits if one.logprobs]
    assert first[0] == pytest.approx(first[1], abs=1e-3)


def test_the_folder_of_this_test_is_complete(tiny: tuple[Path, Any]) -> None:
    names = {path.name for path in tiny[0].iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    assert json.loads((tiny[0] / "config.json").read_text())["vision_config"]


# --- SigLIP -----------------------------------------------------------------------------------


def write_siglip(folder: Path) -> Path:
    """A tiny SigLIP with its processor and a vocabulary, as transformers saves them."""
    text = folder / "text.txt"
    text.write_text(ROMEO[:60_000], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), vocab_size=131,
        model_type="unigram", minloglevel=2, num_threads=1,
    )  # fmt: skip
    siglip_model().save_pretrained(folder)
    pictures = SiglipImageProcessorPil(size={"height": 30, "width": 30})
    SiglipProcessor(pictures, SiglipTokenizer(str(folder / "spiece.model"))).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_siglip_from_files_to_scores(tmp_path: Path) -> None:
    model = load(write_siglip(tmp_path))
    assert isinstance(model, ImageTextModel)
    images, texts = [picture(60, 33), picture(8, 90)], ["Two cats!", "a dog", "Romeo"]
    theirs = SiglipModel.from_pretrained(tmp_path).eval()
    processor = SiglipProcessor(
        SiglipImageProcessorPil.from_pretrained(tmp_path),
        SiglipTokenizer(str(tmp_path / "spiece.model")),
    )
    found = processor(
        text=texts, images=images, padding="max_length", max_length=16, truncation=True,
        return_tensors="np",
    )  # fmt: skip
    result = theirs(  # without the mask of padding, which SigLIP was trained to see
        pixel_values=torch.from_numpy(np.asarray(found["pixel_values"])),
        input_ids=torch.from_numpy(np.asarray(found["input_ids"])),
    )
    bar = logits_tolerance(model.model.config.vision)
    assert difference(model.embed_image(images), result.image_embeds) <= bar
    assert difference(model.embed_text(texts), result.text_embeds) <= bar
    expected = torch.sigmoid(result.logits_per_image)
    assert difference(model.scores(images, texts), expected) <= bar
    assert model.scores(images[0], texts[0]).shape == (1, 1)
    for name in ("chat", "generate", "executor"):
        with pytest.raises(ConfigError, match="writes none: use"):
            getattr(model, name)
    with pytest.raises(AttributeError):
        _ = model.nothing
