"""Boxes that PaliGemma writes: `<loc0256><loc0128><loc0768><loc0640> cat ; …`; drawing them.

Four location codes are y1 x1 y2 x2, each 0 … 1023 for 0 … 1 of the height or width. Sixteen
`<seg…>` codes after them describe a mask, for a decoder that checkpoints do not contain. Source:
big_vision, evaluators/proj/paligemma/transfers/segmentation.py (codes are divided by 1023; a box
without height or width is invalid).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from glassllama.vision.images import require_pillow

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

LAST_CODE = 1023
LOC = r"<loc(?:0\d{3}|10[01]\d|102[0-3])>"
SEG = r"<seg(?:0\d{2}|1[01]\d|12[0-7])>"
GROUPS = re.compile(rf"(?P<locs>(?:{LOC})+)\s*(?P<segs>(?:{SEG})*)(?P<label>[^<;\n]*)", re.ASCII)
DIGITS = re.compile(r"\d+")

# Okabe and Ito's colors, which also color-blind people tell apart, without black and gray.
COLORS = ("#E69F00", "#0072B2", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7", "#009E73")
DARK = "#0072B2"  # the one on which white text has more contrast than black
MIN_SIDE = 512  # pixels; a smaller picture is enlarged, so that labels can be read
LINES_PER_SIDE, TEXTS_PER_SIDE = 256, 36  # widths of a line, heights of a label on the longer side


@dataclass(frozen=True)
class Box:
    """Corners in pixels of the original picture, from the top left; the codes of a mask."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""
    mask_codes: tuple[int, ...] = ()


def parse_boxes(answer: str, width: int, height: int) -> list[Box]:
    """The boxes of an answer, for a picture of this size in pixels.

    Codes that are no multiple of four, and boxes without width or height, are left out; several
    boxes in a row share the label after them.
    """
    boxes: list[Box] = []
    for found in GROUPS.finditer(answer):
        codes = [int(digits) for digits in DIGITS.findall(found["locs"])]
        mask_codes = tuple(int(digits) for digits in DIGITS.findall(found["segs"]))
        for start in range(0, len(codes) if len(codes) % 4 == 0 else 0, 4):
            y1, x1, y2, x2 = (code / LAST_CODE for code in codes[start : start + 4])
            if x1 < x2 and y1 < y2:
                corners = (x1 * width, y1 * height, x2 * width, y2 * height)
                boxes.append(Box(*corners, found["label"].strip(), mask_codes))
    return boxes


def draw_boxes(image: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """A copy of a picture with boxes and labels; small pictures are enlarged by a whole factor.

    Labels have the font that Pillow contains: other characters than ASCII are empty rectangles.
    Raises MissingExtraError.
    """
    require_pillow()
    from PIL import ImageDraw, ImageFont

    factor = -(-MIN_SIDE // max(image.size))  # rounded up
    drawn = image.convert("RGB").resize((image.width * factor, image.height * factor), 0)
    draw = ImageDraw.Draw(drawn)
    draw.font = ImageFont.load_default(max(drawn.size) / TEXTS_PER_SIDE)
    width = -(-max(drawn.size) // LINES_PER_SIDE)
    placed = list(zip(boxes, cycle(COLORS), strict=False))
    for box, color in placed:
        x1, y1, x2, y2 = (round(side * factor) for side in (box.x1, box.y1, box.x2, box.y2))
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))  # the last pixel is drawn, too
        # An inner edge in the color of the text is seen where the picture has the box's color.
        draw.rectangle(corners, outline=_ink(color), width=width + width // 2)
        draw.rectangle(corners, outline=color, width=width)
    for box, color in placed:  # on top of all lines
        if box.label:
            _draw_label(draw, box.label, (round(box.x1 * factor), round(box.y1 * factor)), color)
    return drawn


def _draw_label(draw: ImageDraw.ImageDraw, label: str, at: tuple[int, int], color: str) -> None:
    """A label on a ground of its color above the corner `at`, or below it at the upper edge."""
    left, _, right, _ = draw.textbbox((0, 0), label)
    _, top, _, bottom = draw.textbbox((0, 0), "bg")  # the height of a line
    pad = (bottom - top) // 4
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = max(0, min(at[0], draw.im.size[0] - width))
    y = at[1] - height if at[1] >= height else at[1]
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + pad - left, y + pad - top), label, fill=_ink(color))


def _ink(color: str) -> str:
    return "white" if color == DARK else "black"
