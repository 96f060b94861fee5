"""Pictures → pixel arrays, with the settings of a model's preprocessor_config.json.

The arithmetic is that of transformers' Pillow processors, and the pixels are equal: SigLIP and
PaliGemma resize to a fixed size; Idefics3, SmolVLM and SmolVLM2 resize to a multiple of the tile
size, cut tiles and add the whole picture as one more tile. A key that would change this arithmetic
and is not implemented is an error. Source: transformers 5.24, SiglipImageProcessorPil and
Idefics3ImageProcessorPil; the key names are theirs.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import ConfigError, FormatError, join_names
from glassllama.base.fields import Fields
from glassllama.tokenizers.vocabulary import read_json
from glassllama.vision.images import ACCEPTED, ImageSource, read_image

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.float32]
Size = tuple[int, int]  # width, height, as Pillow has it

MAX_CONFIG = 2**20  # bytes
MAX_EDGE = 4096  # pixels; transformers reduces a larger `size.longest_edge` to it
LANCZOS, BICUBIC = 1, 3  # numbers of filters in files, which are Pillow's (0 to 5)
# Keys of files that change no pixel, or only together with one that is refused.
HARMLESS = re.compile(
    r"_.*|(image_processor|feature_extractor)_type|processor_class|transformers_version"
    r"|do_convert_rgb|(input_)?data_format|return_tensors|device|disable_grouping"
    r"|default_to_square|return_row_col_info|crop_size|pad_size|image_seq_len(gth)?|video_sampling"
)
COMMON = (
    "do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std",
)  # fmt: skip
TILING = ("do_image_splitting", "max_image_size", "do_pad")


@dataclass(frozen=True, kw_only=True, eq=False)
class ProcessedImage:
    """What a model sees of a picture.

    `pixels`: (N, 3, H, W) float32, N tiles. A picture that is split has `rows` × `cols` tiles, row
    by row, and then the whole picture; else N is 1 and both are 0. `size` is the width and height
    of the original, None of a preprocessed array. `settings` describes what made the pixels.
    """

    pixels: Pixels
    rows: int = 0
    cols: int = 0
    size: Size | None = None
    settings: str = ""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of pixels, dtype, shape, split and settings: the key of caches of features."""
        head = (self.pixels.dtype.str, self.pixels.shape, self.rows, self.cols, self.settings)
        found = hashlib.sha256(repr(head).encode())
        found.update(np.ascontiguousarray(self.pixels).data)
        return found.digest()


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Resize, rescale, normalize: the settings that all models share.

    `tile_size` is the width and height of every tile; None: those of the picture. A level v of
    0 … 255 becomes (v · scale − mean) / std, in float32; `scale`, `mean` and `std` are None where
    the file switches the operation off. `image_seq_len` is the number of `<image>` ids per tile,
    None if the file does not say it.
    """

    tile_size: Size | None
    resample: int
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    image_seq_len: int | None = None

    def __call__(self, source: ImageSource) -> ProcessedImage:
        """A picture (see images.ACCEPTED) → its pixels. Raises FormatError, MissingExtraError.

        A float32 array (3, H, W) is taken as already preprocessed: one tile, checked and unchanged.
        """
        if isinstance(source, np.ndarray) and source.dtype.kind == "f":
            return ProcessedImage(pixels=self._checked(source)[None], settings=repr(self))
        image = read_image(source)
        tiles, rows, cols = self._tiles(image)
        pixels = self._normalized(tiles)
        return ProcessedImage(
            pixels=pixels, rows=rows, cols=cols, size=image.size, settings=repr(self)
        )

    def _tiles(self, image: Image.Image) -> tuple[NDArray[np.uint8], int, int]:
        """Levels (N, H, W, 3), rows, columns."""
        raise NotImplementedError

    def _normalized(self, levels: NDArray[np.uint8]) -> Pixels:
        """(N, H, W, 3) levels → (N, 3, H, W). Each level is computed once, in transformers' order:
        scaled in float64, rounded, and normalized in float32."""
        values = (np.arange(256) * (1.0 if self.scale is None else self.scale)).astype(np.float32)
        table = np.repeat(values[None], 3, axis=0)  # (3, 256)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(x, np.float32)[:, None] for x in (self.mean, self.std))  # (3, 1)
            table = (table - mean) / std
        pixels = np.empty((len(levels), 3, *levels.shape[1:3]), np.float32)
        for channel in range(3):
            np.take(table[channel], levels[..., channel], out=pixels[:, channel])
        return pixels

    def _checked(self, pixels: NDArray[Any]) -> Pixels:
        """A preprocessed array (3, H, W), with finite values and the size of a tile."""
        fits = pixels.ndim == 3 and pixels.shape[0] == 3 and min(pixels.shape) > 0
        if pixels.dtype != np.float32 or not fits:
            raise FormatError(f"image: expected {ACCEPTED}; got {pixels.dtype} {pixels.shape}")
        width, height = self.tile_size or pixels.shape[:0:-1]
        if pixels.shape[1:] != (height, width):
            raise FormatError(
                f"image: expected a preprocessed array (3, {height}, {width}), got {pixels.shape}"
            )
        if not np.isfinite(pixels).all():
            raise FormatError("image: the preprocessed array has values that are not finite")
        return pixels


class SiglipProcessor(ImageProcessor):
    """SigLIP, PaliGemma: every picture is resized to `tile_size`; None leaves it as it is."""

    def _tiles(self, image: Image.Image) -> tuple[NDArray[np.uint8], int, int]:
        resized = image if self.tile_size is None else image.resize(self.tile_size, self.resample)
        return np.asarray(resized)[None], 0, 0  # (1, H, W, 3)


@dataclass(frozen=True, kw_only=True)
class Idefics3Processor(ImageProcessor):
    """Idefics3, SmolVLM, SmolVLM2: tiles are squares.

    The longer side becomes `longest_edge` (None: as it is), then both sides the next multiple of
    the tile size. Without `split` the picture becomes one tile, whatever its aspect ratio.
    """

    tile_size: Size
    longest_edge: int | None
    split: bool

    def _tiles(self, image: Image.Image) -> tuple[NDArray[np.uint8], int, int]:
        tile = self.tile_size[0]
        if self.longest_edge is not None:
            image = image.resize(_resized(image.size, self.longest_edge), self.resample)
        if self.split:
            image = image.resize(_tiled(image.size, tile), self.resample)
        cols, rows = image.width // tile, image.height // tile
        whole = np.asarray(image.resize((tile, tile), self.resample))[None]  # (1, H, W, 3)
        if not self.split or rows == cols == 1:
            return whole, 0, 0
        grid = np.asarray(image).reshape(rows, tile, cols, tile, 3)
        tiles = grid.swapaxes(1, 2).reshape(-1, tile, tile, 3)  # (N - 1, H, W, 3)
        return np.concatenate([tiles, whole]), rows, cols


def _scaled(size: Size, longest: int) -> Size:
    """The size with this longer side; the other one keeps the ratio and is rounded down."""
    width, height = size
    ratio = width / height
    return (longest, int(longest / ratio)) if width >= height else (int(longest * ratio), longest)


def _resized(size: Size, longest: int) -> Size:
    """The size with this longer side, and the other one even but for 1."""
    width, height = _scaled(size, longest)
    if size[0] >= size[1]:
        height += height % 2
    else:
        width += width % 2
    return max(width, 1), max(height, 1)


def _tiled(size: Size, tile: int) -> Size:
    """The next size of whole tiles: the longer side first, the other one from the ratio."""
    longest = math.ceil(max(size) / tile) * tile
    width, height = _scaled(size, longest)
    return math.ceil(width / tile) * tile, math.ceil(height / tile) * tile


def pad_batch(prompts: Sequence[Sequence[ProcessedImage]]) -> tuple[Pixels, NDArray[np.bool_]]:
    """The pictures of B prompts → (B, N, 3, H, W) and a mask (B, N, H, W), as in transformers.

    N, H and W are the largest of all; what is added is 0 in both arrays, at the end, at the bottom
    and on the right. Raises FormatError if there is no picture.
    """
    tiles = [[tile for image in images for tile in image.pixels] for images in prompts]
    shapes = [tile.shape[1:] for row in tiles for tile in row]
    if not shapes:
        raise FormatError("images: expected at least one picture in the batch, got none")
    height, width = np.max(shapes, axis=0)
    pixels = np.zeros((len(tiles), max(map(len, tiles)), 3, height, width), np.float32)
    mask = np.zeros((*pixels.shape[:2], height, width), np.bool_)
    for b, row in enumerate(tiles):
        for n, tile in enumerate(row):
            pixels[b, n, :, : tile.shape[1], : tile.shape[2]] = tile
            mask[b, n, : tile.shape[1], : tile.shape[2]] = True
    return pixels, mask


def read_image_processor(folder: Path) -> ImageProcessor:
    """From processor_config.json (`image_processor`, transformers 5) or preprocessor_config.json.

    Raises ConfigError: a missing file, a wrong value, or a key that is not implemented.
    """
    outer = _object(folder / "processor_config.json")
    path = folder / "preprocessor_config.json"
    inner = outer.object("image_processor", None) or _object(path)
    if not inner.values:
        raise ConfigError(f"{path}: is missing; it has the settings for pictures")
    return image_processor(inner, image_seq_len=outer.integer("image_seq_len", None))


def _object(path: Path) -> Fields:
    return Fields(str(path), read_json(path, MAX_CONFIG) if path.is_file() else {})


def image_processor(fields: Fields, image_seq_len: int | None = None) -> ImageProcessor:
    """The processor that a JSON object describes. Raises ConfigError."""
    kind = re.sub("(Fast|Pil)$", "", fields.text("image_processor_type"))
    if kind not in KINDS:
        fields.refuse("image_processor_type", f"one of {join_names(KINDS)}")
    known, resample, build = KINDS[kind]
    unknown = [
        key for key, value in fields.values.items()
        if key not in known and value not in (None, False) and not HARMLESS.fullmatch(key)
    ]  # fmt: skip
    if unknown:
        raise ConfigError(f"{fields.source}: not implemented for pictures: {join_names(unknown)}")
    rescale, normalize = (fields.boolean(key, True) for key in ("do_rescale", "do_normalize"))
    return build(
        fields,
        resample=fields.integer("resample", resample, minimum=0, maximum=5),
        scale=fields.number("rescale_factor", 1 / 255) if rescale else None,
        mean=_channels(fields, "image_mean") if normalize else None,
        std=_channels(fields, "image_std") if normalize else None,
        image_seq_len=fields.integer("image_seq_length", image_seq_len),
    )


def _siglip(fields: Fields, **shared: Any) -> ImageProcessor:
    tile_size = None
    if fields.boolean("do_resize", True):
        width, height = _edges(fields, "size", {"width": 224, "height": 224})
        tile_size = (width, height)
    return SiglipProcessor(tile_size=tile_size, **shared)


def _idefics3(fields: Fields, **shared: Any) -> ImageProcessor:
    longest = None
    if fields.boolean("do_resize", True):
        (longest,) = _edges(fields, "size", {"longest_edge": 4 * 364})
    (tile,) = _edges(fields, "max_image_size", {"longest_edge": 364})
    split = fields.boolean("do_image_splitting", True)
    return Idefics3Processor(tile_size=(tile, tile), longest_edge=longest, split=split, **shared)


KINDS = {  # image_processor_type → keys that are read, the default filter, the function that reads
    "SiglipImageProcessor": (COMMON, BICUBIC, _siglip),
    "Idefics3ImageProcessor": (COMMON + TILING, LANCZOS, _idefics3),
    "SmolVLMImageProcessor": (COMMON + TILING, LANCZOS, _idefics3),
}


def _edges(fields: Fields, key: str, default: Mapping[str, int]) -> list[int]:
    """The values of an object with exactly the keys of `default`: others mean another resize."""
    found = fields.object(key, None) or Fields(f"{fields.source}: {key}", default)
    if {name for name, value in found.values.items() if value is not None} != {*default}:
        fields.refuse(key, f"an object with {join_names(default)}")
    return [found.integer(name, maximum=MAX_EDGE) for name in default]


def _channels(fields: Fields, key: str) -> tuple[float, ...]:
    """Three finite numbers; a divisor is above 0."""
    values = fields.items(key, (0.5,) * 3, of="number")
    if len(values) != 3 or (key == "image_std" and min(values) <= 0):
        fields.refuse(key, "three numbers" + " above 0" * (key == "image_std"))
    return tuple(map(float, values))
