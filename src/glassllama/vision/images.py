"""A file, bytes, a Pillow image or an array → an RGB picture of Pillow, upright, 8 bits a channel.

Only PNG, JPEG, WebP and GIF are decoded. Size and file length are checked before decoding, so that
bad input is a FormatError of one line within a second and 300 MB, and never a large allocation.

As transformers' Pillow processors do (5.24, image_transforms.convert_to_rgb), transparency is shown
on white. Unlike there, the result does not depend on how a picture is passed: paths and Pillow
images are both turned as their EXIF data say, and 16-bit gray keeps its range.
"""

from __future__ import annotations

import io
import os
import re
import stat
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import FormatError, MissingExtraError, named, quoted

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]"

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_FILE = 2**26  # bytes
MAX_SIDE = 2**16 - 1  # the tables of a resize grow with the longer side
MAX_MEMORY = 2**28  # bytes for the decoded picture and its copies
# Bytes per pixel: Pillow's four, and one copy to turn or convert it. A decoder of WebP has two
# canvases more, one of progressive JPEG the coefficients.
PIXEL_BYTES, WEBP_BYTES, PROGRESSIVE_BYTES = 8, 16, 10
# A progressive JPEG of few bytes can have thousands of scans, each of which visits every pixel.
JPEG_START, JPEG_SCAN, MAX_SCANS = b"\xff\xd8", b"\xff\xda", 32
ORIENTATION = 0x0112  # EXIF tag → the operation that undoes it, by the name of Pillow's constant
TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
ACCEPTED = (
    "a path, bytes, a Pillow image, or an array: uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
    "or float32 (3, H, W) that is already preprocessed"
)
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
# One picture is decoded at a time: this bounds memory, and filters of warnings are global.
_lock = threading.Lock()


def require_pillow() -> None:
    """Raises MissingExtraError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise MissingExtraError("reading pictures", "vision") from None


def read_image(source: ImageSource) -> Image.Image:
    """A picture of any of the kinds in `ACCEPTED`, except float32 → a new RGB image of Pillow.

    Of an animation it is the first frame. Raises FormatError: what is wrong with the picture, or
    that it is too large; MissingExtraError.
    """
    require_pillow()
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decoded(source, "image")
    if isinstance(source, str | os.PathLike):
        name, data = named(os.fspath(source)), _file_bytes(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        name, data = "image", bytes(source)
    else:
        raise FormatError(f"image: expected {ACCEPTED}; got {type(source).__name__}")
    _check_bytes(data, name)
    return _decoded(data, name)


def _file_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file, at most one more than MAX_FILE."""
    name = named(os.fspath(path))
    if ADDRESS.match(name):
        raise FormatError(f"{name}: addresses are not opened; download the picture first")
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):  # reading a pipe would block
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise FormatError(f"{name}: is {what}; expected the file of a picture")
        with open(path, "rb") as file:
            return file.read(MAX_FILE + 1)
    except (OSError, ValueError) as fault:  # ValueError: a path with a null byte
        raise FormatError(f"{name}: {getattr(fault, 'strerror', None) or fault}") from None


def _check_bytes(data: bytes, name: str) -> None:
    if not data:
        raise FormatError(f"{name}: is empty; expected the bytes of a picture")
    if len(data) > MAX_FILE:
        raise FormatError(f"{name}: has more than {MAX_FILE:,} bytes; save it smaller")
    if data.startswith(JPEG_START) and (scans := data.count(JPEG_SCAN)) > MAX_SCANS:
        raise FormatError(f"{name}: has {scans} scans; no usual JPEG has more than {MAX_SCANS}")


def _decoded(source: bytes | Image.Image, name: str) -> Image.Image:
    """The RGB picture of checked bytes, or of a Pillow image that may not be decoded yet."""
    from PIL import Image, UnidentifiedImageError

    try:
        with _lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, checked here, and odd metadata
            if isinstance(source, Image.Image):
                return _rgb(source, name)
            with Image.open(io.BytesIO(source), formats=FORMATS) as opened:
                return _rgb(opened, name)
    except FormatError:
        raise
    except UnidentifiedImageError:
        start = quoted(bytes(source[:8])) if isinstance(source, bytes) else ""
        raise FormatError(
            f"{name}: is no PNG, JPEG, WebP or GIF, or is damaged; it begins with {start}"
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(name, MAX_MEMORY // PIXEL_BYTES) from None
    except Exception as fault:  # damaged files raise errors of a dozen kinds
        raise FormatError(f"{name}: cannot be decoded: {quoted(str(fault))}") from fault


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Checks the size, decodes, turns and converts a picture."""
    from PIL import Image

    per_pixel = PROGRESSIVE_BYTES if image.info.get("progressive") else PIXEL_BYTES
    _check_size(image.size, WEBP_BYTES if image.format == "WEBP" else per_pixel, name)
    image.load()
    operation = TURNS.get(_orientation(image))
    if image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise FormatError(f"{name}: mode {image.mode} has no known range; convert it to 8 bits")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        result = Image.new("RGB", image.size, "white")
        result.paste(layer, mask=layer)
    else:
        result = image.convert("RGB")
    result.info = {}  # so that it is not turned again
    return result if operation is None else result.transpose(Image.Transpose[operation])


def _check_size(size: tuple[int, int], per_pixel: int, name: str) -> None:
    width, height = size
    most = MAX_MEMORY // per_pixel
    if min(size) < 1:
        raise FormatError(f"{name}: has no pixels ({width}×{height})")
    if width * height > most or max(size) > MAX_SIDE:
        raise _too_large(f"{name}: {width:,}×{height:,} pixels", most)


def _too_large(what: str, most: int) -> FormatError:
    limits = f"at most {most:,} pixels and {MAX_SIDE:,} on a side"
    return FormatError(f"{what}: too large; expected {limits}: make it smaller")


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation, 1 to 8; None if there is none or the EXIF data are unreadable."""
    with suppress(Exception):  # the parser raises many kinds, too
        return image.getexif().get(ORIENTATION)
    return None


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit gray → the upper 8 bits, as decoders do with 16-bit color; Pillow's convert clips."""
    from PIL import Image

    values = np.array(image)
    if (transparent := image.info.get("transparency")) is not None:
        values[values == transparent] = 2**16 - 1  # white
    return Image.fromarray((values >> 8).astype(np.uint8))


def _from_array(array: NDArray[Any]) -> Image.Image:
    """An 8-bit array (H, W) or (H, W, 1 | 3 | 4) → the picture."""
    from PIL import Image

    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise FormatError(f"image: expected {ACCEPTED}; got {array.dtype} {array.shape}")
    _check_size((array.shape[1], array.shape[0]), PIXEL_BYTES, "image")
    flat = array[..., 0] if array.ndim == 3 and channels == 1 else array
    return _decoded(Image.fromarray(np.ascontiguousarray(flat)), "image")
