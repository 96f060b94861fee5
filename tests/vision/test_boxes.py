"""Boxes in answers: every form that PaliGemma writes, malformed ones, and how they are drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glassllama.vision import boxes
from glassllama.vision.boxes import Box, draw_boxes, parse_boxes
from processor_time import seconds

CAT = "<loc0256><loc0128><loc0768><loc0640>"


def corners(
    *codes: int, width: int = 1023, height: int = 1023
) -> tuple[float, float, float, float]:
    y1, x1, y2, x2 = codes
    return (x1 * width / 1023, y1 * height / 1023, x2 * width / 1023, y2 * height / 1023)


def found(answer: str) -> list[tuple[tuple[float, ...], str]]:
    """Boxes of a picture of 1023 × 1023, in which codes are pixels."""
    return [((b.x1, b.y1, b.x2, b.y2), b.label) for b in parse_boxes(answer, 1023, 1023)]


def test_several_boxes_with_labels() -> None:
    answer = f"{CAT} black cat ; <loc0000><loc0000><loc1023><loc1023> dog"
    assert found(answer) == [
        (corners(256, 128, 768, 640), "black cat"), ((0, 0, 1023, 1023), "dog")
    ]  # fmt: skip


def test_corners_are_pixels_of_the_original_picture() -> None:
    (box,) = parse_boxes(f"{CAT} cat", 640, 480)
    expected = corners(256, 128, 768, 640, width=640, height=480)
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx(expected, rel=1e-15)
    (box,) = parse_boxes("<loc0000><loc0000><loc1023><loc1023> all", 640, 480)
    assert (box.x1, box.y1, box.x2, box.y2) == (0, 0, 640, 480)


def test_codes_of_a_mask_are_listed() -> None:
    codes = (0, 127, *range(50, 64))
    answer = CAT + "".join(f"<seg{code:03}>" for code in codes) + " cat ; " + CAT + " dog"
    cat, dog = parse_boxes(answer, 10, 10)
    assert (cat.label, cat.mask_codes) == ("cat", codes)
    assert (dog.label, dog.mask_codes) == ("dog", ())


def test_forms_of_labels() -> None:
    for answer, labels in {
        CAT: [""],
        f"{CAT} cat\n": ["cat"],
        f"{CAT}cat<eos>": ["cat"],
        f"{CAT} cat;{CAT} dog": ["cat", "dog"],
        f"{CAT} cat ; {CAT}": ["cat", ""],
        f"here: {CAT} größere Katze ; and": ["größere Katze"],
        f"{CAT} first line\nsecond line": ["first line"],
        CAT * 2 + " cats": ["cats", "cats"],
    }.items():
        assert [box.label for box in parse_boxes(answer, 9, 9)] == labels


@pytest.mark.parametrize("answer", [
    "", "a cat", "<loc0001>", "<loc0001><loc0002><loc0003> cat", CAT + "<loc0001> cat",
    "<loc0001><loc0002><loc0003><loc1024> cat", "<loc0001><loc0002><loc0003><loc9999> cat",
    "<loc001><loc002><loc003><loc004>", "<loc٠٠٠١><loc٠٠٠٢><loc٠٠٠٣><loc٠٠٠٤>",
    "<loc0001> <loc0002> <loc0003> <loc0004>", "<loc0001><loc0002><loc0003><seg001><loc0004>",
    "<loc0500><loc0100><loc0400><loc0200> upside down", "<loc0100><loc0300><loc0200><loc0300> flat",
    "<seg001><seg002>", "<loc0001><loc0002><loc0003><loc",
])  # fmt: skip
def test_malformed_groups_are_left_out(answer: str) -> None:
    assert parse_boxes(answer, 100, 100) == []
    assert len(parse_boxes(f"{answer} ; {CAT} cat", 100, 100)) == 1


@given(st.lists(st.sampled_from(
    ["<loc0001>", "<loc1023>", "<loc1024>", "<seg000>", "<seg128>", " ; ", "cat", "<", "<loc", "\n"]
)))  # fmt: skip
def test_any_sequence_of_pieces_is_parsed(pieces: list[str]) -> None:
    for box in parse_boxes("".join(pieces), 7, 5):
        assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((7 / 1023, 5 / 1023, 7, 5))


def test_long_answers_take_linear_time() -> None:
    for piece in ("<loc0001>", "<loc0001><seg001>", "<", " ", "<loc"):
        assert seconds(lambda text=piece * 50_000: parse_boxes(text, 5, 5), enough=1) < 1


# Drawing


def test_drawn_lines_are_the_box() -> None:
    """Only pixels between the outer and the inner edge of the lines change."""
    image = Image.new("RGB", (600, 512), (1, 2, 3))
    drawn = np.asarray(draw_boxes(image, [Box(100, 50, 400, 300)]))
    rows, columns = np.nonzero((drawn != (1, 2, 3)).any(2))
    assert (columns.min(), columns.max() + 1) == (100, 400)
    assert (rows.min(), rows.max() + 1) == (50, 300)
    width = 4  # of the line and of its inner edge
    assert (drawn[50 + width : 300 - width, 100 + width : 400 - width] == (1, 2, 3)).all()
    assert np.asarray(image).max() == 3  # the original is unchanged


@pytest.mark.parametrize("size", [(16, 8), (64, 64), (511, 3), (512, 512), (3000, 100)])
def test_small_pictures_are_enlarged_by_a_whole_factor(size: tuple[int, int]) -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    drawn = draw_boxes(image, [])
    factor = drawn.width // size[0]
    assert drawn.size == (size[0] * factor, size[1] * factor)
    assert max(drawn.size) >= boxes.MIN_SIDE
    assert max(size) * (factor - 1) < boxes.MIN_SIDE
    whole = np.asarray(image).repeat(factor, 0).repeat(factor, 1)
    assert np.array_equal(np.asarray(drawn), whole)


def test_labels_are_inside_the_picture_and_legible() -> None:
    """A label at every edge: its ground and its ink are seen, with the contrast of WCAG's AA."""
    image = Image.new("RGB", (800, 600), "gray")
    for n, (x, y) in enumerate(itertools.product((0, 400, 780), (0, 300, 590))):
        one = Box(x, y, x + 20, y + 10, "cat")
        plain = [Box(0, 0, 1, 1)] * n  # so that every color comes first once
        drawn = np.asarray(draw_boxes(image, [*plain, one])).astype(int)
        color = np.array(
            [int(boxes.COLORS[n % len(boxes.COLORS)][i : i + 2], 16) for i in (1, 3, 5)]
        )
        ink = 255 if boxes.COLORS[n % len(boxes.COLORS)] == boxes.DARK else 0
        assert (drawn == color).all(2).sum() > 200
        assert (drawn == ink).all(2).sum() > 30
        assert contrast(color, np.full(3, ink)) >= 4.5


def contrast(*colors: np.ndarray) -> float:
    """The contrast ratio of WCAG 2.2."""
    linear = [
        np.where(c / 255 <= 0.04045, c / 255 / 12.92, ((c / 255 + 0.055) / 1.055) ** 2.4)
        for c in colors
    ]
    low, high = sorted(float(each @ (0.2126, 0.7152, 0.0722)) + 0.05 for each in linear)
    return high / low


def test_boxes_that_cannot_be_seen_are_drawn_without_error() -> None:
    image = Image.new("RGBA", (30, 20))
    for box in (
        Box(29.9, 19.9, 30, 20, "corner"), Box(0, 0, 0.01, 0.01, "x" * 500),
        Box(0, 0, 30, 20, "no glyphs: 🦙 日本\u0000"), Box(3, 3, 4, 4, ""),
    ):  # fmt: skip
        assert draw_boxes(image, [box]).mode == "RGB"
