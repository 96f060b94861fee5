"""Pictures of every kind → RGB, compared with Pillow and transformers; bad input is one line."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from glassllama.base.errors import FormatError, MissingExtraError
from glassllama.vision import images
from glassllama.vision.images import read_image

SECONDS, MEGABYTES = 1.0, 300  # of processor time, and in all, for an error
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"), "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"), "GIF": ("L", "P", "RGBA"),
}  # fmt: skip


def levels(image: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image)


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 23), seed: int = 0) -> Image.Image:
    """Random blocks, with random transparency where the mode has it."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(blocks, "RGBA").convert(mode)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG file from its uncompressed rows, each with a filter byte; extra chunks before them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = b"".join(extra) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def test_result_is_that_of_transformers_for_every_mode(tmp_path: Path) -> None:
    for format, modes in MODES.items():
        for mode in modes:
            data = encoded(picture(mode), format)
            path = tmp_path / f"{mode}.{format}"
            path.write_bytes(data)
            opened = Image.open(io.BytesIO(data))
            expected = convert_to_rgb(opened, return_numpy=True)
            assert expected.shape == (23, 37, 3)
            for source in (path, str(path), data, Image.open(io.BytesIO(data)), bytearray(data)):
                result = read_image(source)
                assert result.mode == "RGB"
                assert np.array_equal(levels(result), expected), (format, mode, type(source))


def test_transparent_color_of_a_palette_and_of_rgb_is_white() -> None:
    gray = Image.new("L", (2, 1))
    gray.putdata([7, 9])
    data = encoded(gray, "PNG", transparency=7)
    assert levels(read_image(data)).tolist() == [[[255] * 3, [9] * 3]]
    rgb = png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), chunk(b"tRNS", bytes([0, 4, 0, 5, 0, 6])))
    assert levels(read_image(rgb)).tolist() == [[[1, 2, 3], [255] * 3]]


@pytest.mark.parametrize("color", [0, 2, 4, 6])
def test_16_bits_become_the_upper_8(color: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    values = np.random.default_rng(color).integers(0, 2**16, (5, 7, channels), dtype=np.uint16)
    if color in (4, 6):
        values[..., -1] = 2**16 - 1  # opaque
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    result = levels(read_image(png(7, 5, 16, color, rows)))
    assert np.array_equal(
        result, np.broadcast_to(values[..., : 3 if channels > 2 else 1] >> 8, (5, 7, 3))
    )


def test_16_bit_gray_with_a_transparent_value() -> None:
    rows = b"\0" + struct.pack(">HH", 256, 257)
    data = png(2, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 256)))
    assert levels(read_image(data)).tolist() == [[[255] * 3, [1] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_as_exif_says(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    data = encoded(picture(), format, exif=exif)
    expected = levels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert expected.shape == ((23, 37, 3) if orientation < 5 else (37, 23, 3))
    assert np.array_equal(levels(read_image(data)), expected)
    assert np.array_equal(levels(read_image(Image.open(io.BytesIO(data)))), expected)
    assert np.array_equal(levels(read_image(read_image(data))), expected)  # not turned again


def test_unreadable_exif_is_ignored() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff")
    assert read_image(data).size == (37, 23)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "MPO"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (9, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {"quality": 100}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(levels(read_image(data)) - [255, 0, 0]).max() <= (format == "MPO")  # JPEGs


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4), (1, 1, 3)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    given = array[:, :, None] if array.ndim == 2 else array
    expected = convert_to_rgb(given, return_numpy=True, input_data_format="channels_last")
    assert np.array_equal(levels(read_image(array)), expected)
    assert np.array_equal(levels(read_image(array[::-1])), expected[::-1])  # not contiguous


def test_the_result_is_a_copy() -> None:
    image = picture()
    before = levels(image).copy()
    read_image(image).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(levels(image), before)


def test_smallest_and_longest_picture() -> None:
    assert read_image(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).getpixel((0, 0)) == (
        255,
        0,
        0,
    )
    for size in ((images.MAX_SIDE, 1), (1, images.MAX_SIDE)):
        assert read_image(encoded(Image.new("L", size), "PNG")).size == size


# Bad input: name → bytes or array, and a part of the message


def bomb_of_text() -> bytes:
    """A megabyte of file whose text chunks hold 128 times Pillow's limit of one of them."""
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**20 - 1), 9))
    return png(1, 1, 8, 0, b"\0\0", *[text] * 128)


def patched_jpeg(width: int, height: int) -> bytes:
    data = encoded(picture(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def huge_webp() -> bytes:
    """An animation with a canvas of 16,384 × 16,384 and one frame of 1 × 1."""
    image = encoded(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    canvas = (2**14 - 1).to_bytes(3, "little") * 2
    frame = bytes(12) + b"\1\0\0\0" + image
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + canvas
    body += (
        b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is there a thousand times."""
    data = encoded(Image.new("L", (512, 512), 99), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * 1000 + data[-2:]


def large(format: str, side: int, keep: float, **options: Any) -> bytes:
    """A large picture without its end."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(blocks).resize((side, side), 0), format, **options)
    return data[: int(len(data) * keep)]


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "50,000 × 50,000": (lambda: png(50_000, 50_000, 8, 2, bytes(9)), "expected at most 33,554,432"),
    "10,000 × 10,000": (lambda: png(10_000, 10_000, 8, 2, bytes(9)), "10,000×10,000 pixels"),
    "long": (lambda: png(65_536, 1, 8, 0, bytes(65_537)), "65,536×1 pixels"),
    "huge GIF": (lambda: b"GIF89a\xff\xff\xff\xff" + encoded(picture("P"), "GIF")[10:], "pixels"),
    "huge JPEG": (lambda: patched_jpeg(65_500, 65_500), "too large; expected at most"),
    "huge WebP": (huge_webp, "too large; expected at most"),
    "no width": (lambda: png(0, 1, 8, 0, bytes(1)), "image: "),
    "bomb of text": (bomb_of_text, "cannot be decoded"),
    "scans": (many_scans, "scans; no usual JPEG"),
    "truncated PNG": (lambda: large("PNG", 5792, 0.9, compress_level=1), "truncated"),
    "truncated JPEG": (lambda: large("JPEG", 2000, 0.9), "truncated"),
    "truncated progressive": (
        lambda: large("JPEG", 5181, 0.9, progressive=True, subsampling=0, quality=5), "truncated"
    ),
    "truncated WebP": (lambda: large("WEBP", 2048, 0.9, method=0), "cannot be decoded"),
    "length of a chunk": (lambda: png(1, 1, 8, 0, b"")[:33] + b"\x7f\xff\xff\xffIDATx", "image: "),
    "text": (lambda: b"hello world", "it begins with b'hello wo'"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG, JPEG, WebP or GIF"),
    "BMP": (lambda: encoded(picture(), "BMP"), "no PNG, JPEG, WebP or GIF"),
    "TIFF": (lambda: encoded(picture(), "TIFF"), "no PNG, JPEG, WebP or GIF"),
    "nothing": (lambda: b"", "is empty"),
    "float64": (lambda: np.zeros((3, 4, 4)), "got float64 (3, 4, 4)"),
    "channels first": (lambda: np.zeros((3, 5, 7), np.uint8), "got uint8 (3, 5, 7)"),
    "one axis": (lambda: np.zeros(4, np.uint8), "got uint8 (4,)"),
    "no pixels": (lambda: np.zeros((0, 4, 3), np.uint8), "has no pixels (4×0)"),
    "huge array": (lambda: np.broadcast_to(np.uint8(0), (50_000, 50_000)), "50,000×50,000 pixels"),
    "mode F": (lambda: Image.new("F", (2, 2)), "mode F has no known range"),
    "number": (lambda: 3, "expected a path, bytes, a Pillow image"),
}  # fmt: skip


@cache
def bad_input(name: str) -> Any:
    return BAD[name][0]()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_of_one_line(name: str) -> None:
    source, message = bad_input(name), BAD[name][1]
    with pytest.raises(FormatError) as caught:
        read_image(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_bad_files_are_errors_within_a_second_and_300_megabytes(tmp_path: Path) -> None:
    for n, name in enumerate(BAD):
        if isinstance(data := bad_input(name), bytes):
            (tmp_path / f"{n:02}").write_bytes(data)
    with open(tmp_path / "zeros", "wb") as file:
        file.truncate(images.MAX_FILE + 1)
    program = """
import sys, time
from pathlib import Path
from glassllama.base.errors import FormatError
from glassllama.vision.images import read_image
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.process_time()
    try:
        read_image(path)
    except FormatError as fault:
        assert str(fault).startswith(str(path)), fault
    else:
        raise AssertionError(path)
    assert time.process_time() - start <= float(sys.argv[2]), path
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(int(peak) // 1000)
"""
    run = [sys.executable, "-W", "error", "-c", program, str(tmp_path), str(SECONDS)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout) <= MEGABYTES


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "locked").touch(0)
    for path, message in {
        str(tmp_path): "is a folder; expected the file of a picture",
        str(tmp_path / "pipe"): "is a pipe or device",
        "/dev/zero": "is a pipe or device",
        str(tmp_path / "absent.png"): "No such file or directory",
        "https://example.com/cat.png": "addresses are not opened; download the picture first",
        "file:///tmp/cat.png": "addresses are not opened",
        "data:image/png;base64,AAAA": "addresses are not opened",
        "a\0b": "null",
        "x" * 5000: "File name too long",
    }.items():
        with pytest.raises(FormatError, match=message) as caught:
            read_image(path)
        assert len(str(caught.value)) < 250


def outcome(data: bytes) -> np.ndarray[Any, Any] | str:
    """The picture, or the message of its error."""
    try:
        return levels(read_image(data))
    except FormatError as fault:
        return str(fault)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_files_are_errors_or_pictures(format: str) -> None:
    data = encoded(picture(), format)
    whole = levels(read_image(data))
    outcomes = [outcome(data[:length]) for length in range(1, len(data), 7)]
    pictures = [one for one in outcomes if not isinstance(one, str)]
    assert len(pictures) <= 3  # PNG: 20 bytes after the pixels are checksums and the end
    assert all(np.array_equal(one, whole) for one in pictures)
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        result = outcome(damaged.tobytes())
        assert "\n" not in result if isinstance(result, str) else min(result.shape) > 0


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError) as caught:
        read_image(b"")
    assert str(caught.value) == (
        "reading pictures needs an extra: pip install 'glassllama[vision]'"
    )


def test_pillow_is_imported_only_when_needed() -> None:
    program = (
        "import sys; from glassllama.vision import boxes, images, processing, prompts; "
        "boxes.parse_boxes('', 1, 1); assert not {'PIL', 'torch', 'numba'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
