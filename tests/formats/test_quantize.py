"""Quantization to Q8_0 and Q4_0, byte by byte against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from glassllama.base.errors import FormatError
from glassllama.formats.blocks import PACK, dequantize, quantize

KINDS = pytest.mark.parametrize("kind", PACK)
LARGEST = {"Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}  # of a scale in half precision
HALF = 2**-11  # relative rounding error of a scale in float16
WORST = {"Q8_0": 0.5 / 127, "Q4_0": 1 / 8}  # rounding error, of the block's largest number


def mixed() -> np.ndarray:
    """Small, normal and large rows, blocks of zeros, ties, signed zeros, subnormal numbers."""
    rng = np.random.default_rng(3)
    scales = rng.choice([1e-30, 1e-7, 1e-3, 1, 1e3], (300, 1))
    matrix = (rng.normal(size=(300, 96)) * scales).astype(np.float32)
    matrix[5] = 0
    matrix[6, :32] = [0.5, -0.5] * 16
    matrix[7, :32] = [-0.0, 0.0] * 16
    matrix[8, :32] = np.arange(-16, 16)
    matrix[9, :32] = np.arange(32) / 2
    return matrix


@KINDS
def test_blocks_are_those_of_the_gguf_package(kind: str) -> None:
    theirs = gguf.quantize(mixed(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(quantize(mixed(), kind), theirs)


@KINDS
@pytest.mark.parametrize("seed", range(5))
def test_random_bit_patterns(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 2**32, (2000, 64), np.uint32).view(np.float32)
    matrix = np.where(np.abs(matrix) < 5e5, matrix, np.float32(1)) + np.float32(1e-20)
    theirs = gguf.quantize(matrix, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(quantize(matrix, kind), theirs)


@KINDS
def test_dequantized_numbers_are_close(kind: str) -> None:
    matrix = mixed()[:, :32]
    matrix = matrix[np.abs(matrix).max(axis=1) > 1e-2]  # smaller scales are subnormal in float16
    back = dequantize(quantize(matrix, kind), kind, matrix.shape)
    apart = np.abs(back - matrix) / np.abs(matrix).max(axis=1, keepdims=True)
    assert 0 < apart.max() <= WORST[kind] + HALF


@KINDS
@pytest.mark.parametrize("kept", [np.float16, np.float64])
def test_other_floats_are_converted_to_float32(kind: str, kept: type) -> None:
    matrix = np.random.default_rng(1).normal(size=(3, 64)).astype(kept)
    assert np.array_equal(quantize(matrix, kind), quantize(matrix.astype(np.float32), kind))
    assert np.array_equal(quantize(matrix[:, ::-1], kind), quantize(matrix[:, ::-1].copy(), kind))


@KINDS
def test_empty_arrays(kind: str) -> None:
    assert quantize(np.zeros((0, 64), np.float32), kind).shape[0] == 0
    assert quantize(np.zeros((2, 0), np.float32), kind).shape == (2, 0)
    tiny = np.full((1, 32), 1e-42, np.float32)
    assert not dequantize(quantize(tiny, kind), kind, (1, 32)).any()


@KINDS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_numbers_beyond_the_range_of_scales_are_refused(kind: str, value: float) -> None:
    matrix = np.ones((5000, 32), np.float32)
    matrix[4999, 31] = value
    with pytest.raises(FormatError, match=f"{kind}: NaN, infinities or numbers beyond"):
        quantize(matrix, kind)
    matrix[4999, 31] = LARGEST[kind]
    assert quantize(matrix, kind).shape[0] == 5000


@KINDS
def test_rows_that_are_not_whole_blocks_are_refused(kind: str) -> None:
    for shape in ((4, 70), (32,), (2, 2, 32)):
        with pytest.raises(FormatError, match=f"{kind} takes rows of whole blocks of 32 numbers"):
            quantize(np.zeros(shape, np.float32), kind)
