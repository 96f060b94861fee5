"""`glassllama describe` with a tiny vision-language model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli.conftest import Verb
from glassllama import load
from glassllama.cli.repl import ChatSession, Conversation, Repl
from test_pictures import write, write_siglip
from vision.test_prompts import picture

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    write("paligemma", path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture(60, 33).save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_an_answer(folder: Path, image: Path, verb: Verb) -> None:
    words = ("describe", image, "What is it?", "-m", folder, "-n", 5, "-t", 0)
    shown, found = verb(*words), json.loads(verb(*words, "--json").out)
    assert shown.code == 0
    assert shown.out.strip() == found["text"].strip()
    assert found["boxes"] == []
    assert found["usage"]["completion_tokens"] <= 5


def test_boxes_are_drawn(
    folder: Path, image: Path, verb: Verb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The answer of a random model has none, so a text stands for it."""
    from glassllama.cli import describe

    found = describe.draw_answer(
        Image.open(image), "<loc0256><loc0128><loc0768><loc0640> cat", tmp_path / "drawn.png"
    )
    assert [box["label"] for box in found] == ["cat"]
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (60 * 9, 33 * 9)  # small pictures are enlarged
        assert len(drawn.getcolors(1 << 20) or ()) > 1
    ran = verb("describe", image, "-m", folder, "-n", 2, "--draw", tmp_path / "none.png")
    assert ran.code == 0
    assert "no boxes" in ran.err
    assert (tmp_path / "none.png").is_file()
    ran = verb("describe", image, "-m", folder, "-n", 1, "--draw", tmp_path / "a" / "b.png")
    assert ran.code == 1
    assert "cannot be saved" in ran.err


def test_what_is_refused(folder: Path, image: Path, default_model: Path, verb: Verb) -> None:
    text = image.with_name("text.png")
    text.write_text("no picture")
    for words, part in (
        (("describe", image, "-m", default_model), "reads no pictures: it is a text model"),
        (("describe", text, "-m", folder), "text.png"),
        (("describe", image.with_name("missing.png"), "-m", folder), "missing.png"),
        (("describe", image.parent, "-m", folder), str(image.parent)),
    ):
        ran = verb(*words)
        assert ran.code == 1
        assert part in ran.err
        assert len(ran.err.strip().splitlines()) == 1, ran.err


# --- classify ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: Any) -> Path:
    return write_siglip(tmp_path_factory.mktemp("siglip"))


def test_probabilities_of_labels(siglip: Path, image: Path, verb: Verb) -> None:
    labels = ("a cat", "two dogs", "nothing")
    shown = verb("classify", image, *labels, "-m", siglip)
    scores = json.loads(verb("classify", image, *labels, "-m", siglip, "--json").out)["scores"]
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == [*scores]
    assert [*scores.values()] == sorted(scores.values(), reverse=True)
    assert set(scores) == set(labels)


def test_what_classify_refuses(siglip: Path, folder: Path, image: Path, verb: Verb) -> None:
    for words, code, part in (
        (("classify", image, "a cat", "-m", folder), 1, "needs a SigLIP model"),
        (("classify", image, "-m", siglip), 2, "LABELS"),
        (("classify", image, "a", "-m", siglip, "--template", "x"), 2, "must contain {}"),
        (("chat", "Hello", "-m", siglip), 1, "writes none"),
        (("generate", "Hello", "-m", siglip), 1, "writes none"),
        (("show", siglip), 1, "no language model"),
    ):
        ran = verb(*words)
        assert ran.code == code, ran.err
        assert part in ran.err


# --- chat -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("idefics3")
    write("idefics3", path)
    return path


def test_a_picture_in_a_chat(idefics3: Path, image: Path, verb: Verb) -> None:
    words = ("chat", "What is it?", "-m", idefics3, "-n", 4, "-t", 0, "--json")
    plain = json.loads(verb(*words).out)
    once = json.loads(verb(*words, "--image", image).out)
    twice = json.loads(verb(*words, "--image", image, "--image", image).out)
    counts = [found["usage"]["prompt_tokens"] for found in (plain, once, twice)]
    assert counts[1] - counts[0] == counts[2] - counts[1] > 4
    described = json.loads(
        verb("describe", image, "What is it?", "-m", idefics3, "-n", 4, "-t", 0, "--json").out
    )
    assert described["ids"] == once["ids"]


def test_the_image_command(
    idefics3: Path, image: Path, default_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from glassllama.cli.options import SamplingOptions

    with load(idefics3) as llm:
        session = ChatSession(llm, Conversation(), SamplingOptions(max_tokens=3, temperature=0.0))
        repl = Repl(session)
        repl.handle(f"/image {image}")
        assert "tokens, shown with the next message" in capsys.readouterr().out
        repl.handle("What is it?")
        repl.handle("And again?")
        first, _, second, _ = session.conversation.history
        assert isinstance(first.content, list)
        assert [part["type"] for part in first.content] == ["image", "text"]
        assert second.content == "And again?"
        saved = image.with_name("talk.json")
        repl.handle(f"/save {saved}")
        repl.handle(f"/load {saved}")
        assert session.conversation.history[0].content == first.content
        repl.handle("And now?")
        assert len(session.conversation.history) == 6
        repl.handle(f"/image {image.with_name('missing.png')}")
        assert "missing.png" in capsys.readouterr().err
    with load(default_model) as llm:
        repl = Repl(ChatSession(llm, Conversation(), SamplingOptions()))
        repl.handle(f"/image {image}")
        assert "it is a text model" in capsys.readouterr().err
