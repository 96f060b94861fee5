"""Pixel arrays equal those of transformers' Pillow processors, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from glassllama.base.errors import ConfigError, FormatError, GlassError
from glassllama.base.fields import Fields
from glassllama.vision import processing
from glassllama.vision.processing import (
    ImageProcessor,
    ProcessedImage,
    image_processor,
    pad_batch,
    read_image_processor,
)

# Width, height: square, wide, tall, larger and smaller than the result, extreme ratios.
SIZES = (
    (1, 1), (2, 3), (1, 300), (300, 1), (17, 1000), (1000, 3), (64, 64), (65, 64), (63, 65),
    (128, 128), (129, 127), (200, 113), (113, 200), (320, 240), (511, 77), (97, 401),
)  # fmt: skip
SIGLIP = {"size": {"height": 56, "width": 56}}
PALIGEMMA = {"size": {"height": 42, "width": 70}, "image_seq_length": 15, "do_convert_rgb": None}
SMALL = {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}


def picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((*size, seed))
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8), "RGBA")
    return image.convert(mode)


def saved(foreign: Any, folder: Path) -> ImageProcessor:
    """The processor that reads the file that transformers writes."""
    foreign.save_pretrained(folder)
    return read_image_processor(folder)


def processor(**values: Any) -> ImageProcessor:
    return image_processor(Fields("file.json", values))


@pytest.mark.parametrize("options", [
    SIGLIP, PALIGEMMA,
    SIGLIP | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.7, 0.8, 0.9]},
    SIGLIP | {"do_normalize": False}, SIGLIP | {"do_rescale": False},
    SIGLIP | {"do_resize": False}, SIGLIP | {"rescale_factor": 1 / 127.5},
    *(SIGLIP | {"resample": resample} for resample in range(6)),
])  # fmt: skip
def test_siglip(options: dict[str, Any], tmp_path: Path) -> None:
    foreign = SiglipImageProcessorPil(**options)
    ours = saved(foreign, tmp_path)
    for size in SIZES:
        for mode in ("RGB", "RGBA", "L") if foreign.do_convert_rgb else ("RGB",):
            image = picture(size, mode)
            expected = foreign(image, return_tensors="np")["pixel_values"]
            result = ours(image)
            assert result.pixels.dtype == expected.dtype == np.float32
            assert np.array_equal(result.pixels, expected), (size, mode)
            assert (result.rows, result.cols, result.size) == (0, 0, size)


@pytest.mark.parametrize("foreign_class", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
@pytest.mark.parametrize("options", [
    SMALL, SMALL | {"do_image_splitting": False}, SMALL | {"do_resize": False},
    SMALL | {"resample": 3},
    {"size": {"longest_edge": 250}, "max_image_size": {"longest_edge": 37}},
    {"size": {"longest_edge": 33}, "max_image_size": {"longest_edge": 64}},
])  # fmt: skip
def test_idefics3(foreign_class: Any, options: dict[str, Any], tmp_path: Path) -> None:
    foreign = foreign_class(**options)
    ours = saved(foreign, tmp_path)
    for size in SIZES:
        image = picture(size)
        expected = foreign(image, return_tensors="np", return_row_col_info=True)
        result = ours(image)
        assert np.array_equal(result.pixels, expected["pixel_values"][0]), size
        assert [[result.rows]] == expected["rows"]
        assert [[result.cols]] == expected["cols"]
        assert expected["pixel_attention_mask"].all()


class SizesOnly(Idefics3ImageProcessorPil):
    """Computes the sizes of all resizes, and resizes nothing."""

    def resize(self, image: Any, size: Any, **options: Any) -> Any:
        if size.longest_edge:
            return get_resize_output_image_size(image, size.longest_edge)
        return (size.height, size.width)


def test_sizes_of_many_pictures() -> None:
    rng = np.random.default_rng(0)
    for limit in (5, 100, 3000, 65_535):
        for width, height in rng.integers(1, limit, (200, 2)).tolist():
            longest, tile = rng.integers(1, 4097), rng.integers(1, 700)
            image = np.broadcast_to(np.uint8(0), (3, height, width))
            foreign = SizesOnly()
            resized = foreign.resize(image, SizeDict(longest_edge=longest))
            assert processing._resized((width, height), longest) == resized[::-1]
            tiled = foreign.resize_for_vision_encoder(image, tile)
            assert processing._tiled((width, height), tile) == tiled[::-1]


def test_settings_of_published_models(tmp_path: Path) -> None:
    """SmolVLM-256M splits into tiles of 512, the 2.2B model of 384; longest edges of four tiles."""
    for tile in (384, 512):
        options = {"size": {"longest_edge": 4 * tile}, "max_image_size": {"longest_edge": tile}}
        foreign = Idefics3ImageProcessorPil(**options)
        image = picture((150, 100))
        result = saved(foreign, tmp_path)(image)
        assert (result.rows, result.cols, len(result.pixels)) == (3, 4, 13)
        assert np.array_equal(result.pixels, foreign(image, return_tensors="np")["pixel_values"][0])


def test_defaults_are_those_of_transformers() -> None:
    for foreign in (SiglipImageProcessorPil(), Idefics3ImageProcessorPil()):
        values = json.loads(foreign.to_json_string())
        kind = values["image_processor_type"]
        assert processor(image_processor_type=kind) == processor(**values)


def test_batches_are_padded_as_in_transformers(tmp_path: Path) -> None:
    foreign = Idefics3ImageProcessorPil(**SMALL)
    ours = saved(foreign, tmp_path)
    batch = [[picture((100, 90)), picture((20, 200))], [picture((30, 30))], [picture((9, 70))] * 3]
    expected = foreign(batch, return_tensors="np")
    pixels, mask = pad_batch([[ours(image) for image in images] for images in batch])
    assert np.array_equal(pixels, expected["pixel_values"])
    assert np.array_equal(mask, expected["pixel_attention_mask"])
    assert 0 < mask.mean() < 1


def test_a_batch_of_sizes_and_of_prompts_without_pictures() -> None:
    tall, wide = (
        ProcessedImage(pixels=np.ones((1, 3, *hw), np.float32)) for hw in ((4, 2), (1, 3))
    )
    pixels, mask = pad_batch([[tall, wide], []])
    assert pixels.shape == (2, 2, 3, 4, 3)
    assert [pixels[0, 0].sum(), pixels[0, 1].sum(), pixels[1].sum()] == [24, 9, 0]
    assert np.array_equal(mask, pixels[:, :, 0] == 1)
    with pytest.raises(FormatError, match="at least one picture"):
        pad_batch([[]])


def test_preprocessed_arrays_are_taken_unchanged() -> None:
    given = np.random.default_rng(0).standard_normal((3, 64, 64), np.float32)
    for ours in (
        processor(image_processor_type="SmolVLMImageProcessor", **SMALL),
        processor(
            image_processor_type="SiglipImageProcessorFast", size={"height": 64, "width": 64}
        ),
        processor(image_processor_type="SiglipImageProcessor", do_resize=False),
    ):
        result = ours(given)
        assert np.array_equal(result.pixels, given[None])
        assert (result.rows, result.cols, result.size) == (0, 0, None)


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros((3, 64, 64)), "got float64 (3, 64, 64)"),
    (np.zeros((3, 64, 64), np.float16), "got float16 (3, 64, 64)"),
    (np.zeros((64, 64, 3), np.float32), "got float32 (64, 64, 3)"),
    (np.zeros((1, 3, 64, 64), np.float32), "got float32 (1, 3, 64, 64)"),
    (np.zeros((3, 64, 0), np.float32), "got float32 (3, 64, 0)"),
    (np.zeros((3, 64, 32), np.float32), "expected a preprocessed array (3, 64, 64), got (3, 64, 3"),
    (np.full((3, 64, 64), np.nan, np.float32), "not finite"),
    (np.full((3, 64, 64), -np.inf, np.float32), "not finite"),
])  # fmt: skip
def test_other_arrays_are_refused(array: Any, message: str) -> None:
    ours = processor(image_processor_type="Idefics3ImageProcessor", **SMALL)
    with pytest.raises(FormatError) as caught:
        ours(array)
    assert message in str(caught.value)


def test_digest_differs_whenever_the_features_may() -> None:
    ours = processor(image_processor_type="Idefics3ImageProcessor", **SMALL)
    image = picture((100, 60))
    base = ours(image)
    changed = image.copy()
    changed.putpixel((50, 50), (1, 2, 3))
    other = processor(
        image_processor_type="Idefics3ImageProcessor", image_mean=[0.5, 0.5, 0.4], **SMALL
    )
    one = np.zeros((3, 64, 64), np.float32)
    flipped = ProcessedImage(
        pixels=base.pixels, rows=base.cols, cols=base.rows, settings=base.settings
    )
    same = ProcessedImage(
        pixels=base.pixels, rows=base.rows, cols=base.cols, settings=base.settings, size=(7, 7)
    )
    different = [base, ours(changed), other(image), ours(one), other(one), flipped]
    different.append(ProcessedImage(pixels=base.pixels.astype(np.float64), settings=base.settings))
    different.append(ProcessedImage(pixels=one.reshape(1, 3, 32, 128), settings=repr(ours)))
    assert len({each.digest for each in different}) == len(different)
    assert base.digest == ours(image.copy()).digest == same.digest
    assert len(base.digest) == 32


# Files


def test_transformers_5_writes_processor_config_only(tmp_path: Path) -> None:
    inner = json.loads(Idefics3ImageProcessorPil(**SMALL).to_json_string())
    outer = {"image_processor": inner, "image_seq_len": 64, "processor_class": "Idefics3Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(outer))
    assert read_image_processor(tmp_path) == image_processor(Fields("x", inner), 64)
    # as in transformers, it comes before the older file
    other = inner | {"max_image_size": {"longest_edge": 99}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
    assert read_image_processor(tmp_path) == image_processor(Fields("x", inner), 64)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_seq_len": 81}))
    assert read_image_processor(tmp_path) == image_processor(Fields("x", other), 81)


def test_number_of_image_tokens() -> None:
    assert processor(image_processor_type="SiglipImageProcessor", **PALIGEMMA).image_seq_len == 15
    assert processor(image_processor_type="SiglipImageProcessor").image_seq_len is None


def test_keys_without_effect_are_ignored() -> None:
    """Those of SmolVLM2 and of files that fast processors wrote."""
    unused = {
        "crop_size": None, "data_format": "channels_first", "default_to_square": True,
        "device": None, "disable_grouping": None, "do_center_crop": None, "input_data_format": None,
        "do_pad": True, "return_tensors": None, "pad_size": None,
        "video_sampling": {"fps": 1, "max_frames": 64},
        "processor_class": "SmolVLMProcessor", "_valid_processor_keys": ["images"],
    }  # fmt: skip
    kind = {"image_processor_type": "SmolVLMImageProcessorFast"}
    assert processor(**kind, **SMALL, **unused) == processor(**kind, **SMALL)


@pytest.mark.parametrize(("values", "message"), [
    ({"do_center_crop": True}, "not implemented for pictures: do_center_crop"),
    ({"do_pad": True}, "not implemented for pictures: do_pad"),
    ({"do_flip_channel_order": True, "offset": 1}, "pictures: do_flip_channel_order, offset"),
    ({"image_processor_type": "CLIPImageProcessor"}, "one of Idefics3ImageProcessor, Siglip"),
    ({"image_processor_type": None}, "image_processor_type is missing"),
    ({"size": 224}, "size"),
    ({"size": {"shortest_edge": 224}}, "size must be an object with height, width"),
    ({"size": {"height": 2, "width": 0}}, "width must be a whole number from 1 to 4096, got 0"),
    ({"size": {"height": 5000, "width": 2}}, "height must be a whole number from 1 to 4096"),
    ({"size": {"longest_edge": 5000}, "image_processor_type": "SmolVLMImageProcessor"},
     "longest_edge must be a whole number from 1 to 4096, got 5000"),
    ({"resample": 6}, "resample must be a whole number from 0 to 5, got 6"),
    ({"resample": "bicubic"}, "resample"),
    ({"image_mean": [0.5]}, "image_mean must be three numbers, got [0.5]"),
    ({"image_std": [0.5, 0, 0.5]}, "image_std must be three numbers above 0"),
    ({"image_std": 0.5}, "image_std"),
    ({"rescale_factor": float("nan")}, "rescale_factor"),
    ({"do_resize": 1}, "do_resize must be true or false, got 1"),
])  # fmt: skip
def test_settings_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        processor(**({"image_processor_type": "SiglipImageProcessor"} | values))
    assert str(caught.value).startswith("file.json: ")
    assert message in str(caught.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: is missing"):
        read_image_processor(tmp_path)
    for text in ("{", "[]", '{"image_processor_type": 3}'):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(GlassError, match=r"preprocessor_config.json: "):
            read_image_processor(tmp_path)
