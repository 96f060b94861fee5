"""Block types against the `gguf` package bit for bit, and against manually computed values."""

from __future__ import annotations

import gguf as foreign
import numpy as np
import pytest
from ml_dtypes import bfloat16

from glassllama.base.errors import FormatError
from glassllama.formats.blocks import BLOCKS, CHUNK, SUPPORTED, TYPES, dequantize

# Offsets of the float16 numbers in a block.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip
ODD_HALVES = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 6e-8, -6e-8, 6.1e-5, 65504, -65504, 1.0], np.float16
)


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


def random_blocks(dtype: str, count: int) -> np.ndarray:
    """Blocks of random bytes, so that every bit pattern can occur -> uint8 (count, bytes)."""
    rng = np.random.default_rng(sum(map(ord, dtype)))
    return rng.integers(0, 256, (count, TYPES[dtype].bytes), dtype=np.uint8)


def theirs(raw: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        numbers = foreign.quants.dequantize(raw, foreign.GGMLQuantizationType[dtype])
    if dtype == "MXFP4":  # theirs computes 2^128 · e2m1 where the MX specification says NaN
        numbers.reshape(-1, 32)[raw.reshape(-1, 17)[:, 0] == 255] = np.nan
    return numbers


def assert_same_bits(ours: np.ndarray, other: np.ndarray) -> None:
    assert ours.dtype == other.dtype == np.float32
    assert np.array_equal(ours.reshape(-1).view(np.uint32), other.reshape(-1).view(np.uint32))


def test_the_layouts_are_those_of_the_gguf_package() -> None:
    assert set(BLOCKS) == set(HALVES)
    for name in (*SUPPORTED, "I8", "I16", "I32", "I64"):
        layout = TYPES[name]
        sizes = foreign.GGML_QUANT_SIZES[foreign.GGMLQuantizationType[name]]
        assert (layout.elements, layout.bytes) == sizes


@pytest.mark.parametrize("dtype", BLOCKS)
@pytest.mark.identical("dequantized blocks, bit for bit", "gguf.quants")
def test_random_blocks(dtype: str) -> None:
    """More than two chunks and not a multiple of one; some scales are NaN."""
    elements = TYPES[dtype].elements
    raw = random_blocks(dtype, (2 * CHUNK + 3 * elements) // elements)
    ours = dequantize(raw, dtype, (raw.size // raw.shape[1] * elements,))
    assert np.isnan(ours).any()
    assert_same_bits(ours, theirs(raw, dtype))


@pytest.mark.parametrize(("dtype", "at"), [(name, at) for name in HALVES for at in HALVES[name]])
def test_odd_scales(dtype: str, at: int) -> None:
    """Zeros, subnormal, largest, infinite and NaN, as scale and as minimum."""
    raw = random_blocks(dtype, len(ODD_HALVES))
    for other in HALVES[dtype]:
        raw[:, other : other + 2] = np.frombuffer(half(1.5), np.uint8)
    raw[:, at : at + 2] = ODD_HALVES[:, None].view(np.uint8)
    ours = dequantize(raw, dtype, (len(raw), TYPES[dtype].elements))
    assert np.isnan(ours).any()
    assert np.isinf(ours).any()
    assert_same_bits(ours, theirs(raw, dtype))


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_quantized_by_the_gguf_package(dtype: str) -> None:
    weights = np.random.default_rng(1).normal(size=(3, 5, 64)).astype(np.float32)
    raw = foreign.quants.quantize(weights, foreign.GGMLQuantizationType[dtype])
    ours = dequantize(raw, dtype, weights.shape)
    assert_same_bits(ours, theirs(raw, dtype))
    steps = 127 if dtype == "Q8_0" else 2 ** int(dtype[1]) / 2
    assert np.abs(ours - weights).max() <= 1.1 * np.abs(weights).max() / steps


# ── manually computed ─────────────────────────────────────────────────────────────────────────


NIBBLES = bytes(low | (15 - low) << 4 for low in range(16))  # codes 0 … 15, then 15 … 0
UP_DOWN = np.array([*range(16), *range(15, -1, -1)])
TOP_BITS = np.uint32(0xFFFF0000).tobytes()  # set for codes 16 … 31
FIVE = UP_DOWN + np.repeat([0, 16], 16)

BY_HAND = {
    "Q4_0": (half(0.5) + NIBBLES, 0.5 * (UP_DOWN - 8)),
    "Q4_1": (half(0.5) + half(-3) + NIBBLES, 0.5 * UP_DOWN - 3),
    "Q5_0": (half(2) + TOP_BITS + NIBBLES, 2 * (FIVE - 16)),
    "Q5_1": (half(2) + half(100) + TOP_BITS + NIBBLES, 2 * FIVE + 100),
    "Q8_0": (half(-0.25) + bytes(range(112, 144)), [*(-0.25 * np.arange(112, 128)),
             *(-0.25 * np.arange(-128, -112))]),
}  # fmt: skip


def sixteens(values: list[float]) -> np.ndarray:
    return np.repeat(values, 16)


def thirty_twos(values: list[float]) -> np.ndarray:
    return np.repeat(values, 32)


# All codes of a group in a superblock are equal, so that a value shows which group it came from.
CODES_2 = bytes([0b11_10_01_00] * 64)  # groups of 32 contain 0 1 2 3 0 1 2 3
CODES_4 = bytes([0xE1] * 32 + [0xC3] * 32 + [0xA5] * 32 + [0x87] * 32)  # 1 14 3 12 5 10 7 8
PAIRS = [1, 14, 3, 12, 5, 10, 7, 8]
# Scales 1 2 3 63 | 33 34 35 36 and minima 4 5 6 7 | 1 2 3 63: the last four are in two parts.
SIX_BITS = bytes([2 << 6 | 1, 2 << 6 | 2, 2 << 6 | 3, 2 << 6 | 63, 4, 5, 6, 3 << 6 | 7])
SIX_BITS += bytes([1 << 4 | 1, 2 << 4 | 2, 3 << 4 | 3, 15 << 4 | 4])
SCALES, MINIMA = [1, 2, 3, 63, 33, 34, 35, 36], [4, 5, 6, 7, 1, 2, 3, 63]
ODD_GROUPS = bytes([0b1010_1010] * 32)  # the high bit of groups 1 3 5 7
# Sixteen scales of 6 bits, stored plus 32: 33 … 48 are the scales 1 … 16.
LOW_OF = bytes((33 + i) % 16 | (41 + i) % 16 << 4 for i in range(8))
HIGH_OF = bytes(sum((33 + i + 4 * g) // 16 << 2 * g for g in range(4)) for i in range(4))

E2M1 = [  # OCP MX v1.0, table 5: without a leading one if the two bits of exponent are zero
    (-1) ** (code >> 3)
    * (2.0 ** (max(code >> 1 & 3, 1) - 1) * ((code >> 1 & 3 > 0) + (code & 1) / 2))
    for code in range(16)
]
BY_HAND |= {
    "MXFP4": (bytes([129]) + NIBBLES, [4 * E2M1[code] for code in UP_DOWN]),
    "Q2_K": (
        bytes(i | (15 - i) << 4 for i in range(16)) + CODES_2 + half(0.5) + half(2),
        sixteens([0.5 * i * (i // 2 % 4) - 2 * (15 - i) for i in range(16)]),
    ),
    "Q3_K": (
        ODD_GROUPS + CODES_2 + LOW_OF + HIGH_OF + half(0.5),
        sixteens([0.5 * (i + 1) * (i // 2 % 4 - (0 if i // 2 % 2 else 4)) for i in range(16)]),
    ),
    "Q4_K": (
        half(0.5) + half(2) + SIX_BITS + CODES_4,
        thirty_twos([0.5 * SCALES[i] * PAIRS[i] - 2 * MINIMA[i] for i in range(8)]),
    ),
    "Q5_K": (
        half(0.5) + half(2) + SIX_BITS + ODD_GROUPS + CODES_4,
        thirty_twos(
            [0.5 * SCALES[i] * (PAIRS[i] + 16 * (i % 2)) - 2 * MINIMA[i] for i in range(8)]
        ),
    ),
    "Q6_K": (
        # Low halves 1 (elements 0 … 63 of each 128) and high halves 14; top bits 0 1 2 3.
        bytes([0xE1] * 128) + CODES_2 + np.arange(-8, 8, dtype=np.int8).tobytes() + half(0.5),
        sixteens(
            [
                0.5 * (i - 8) * ((1, 1, 14, 14)[i // 2 % 4] + 16 * (i // 2 % 4) - 32)
                for i in range(16)
            ]
        ),
    ),
}


@pytest.mark.parametrize("dtype", BY_HAND)
def test_manually_computed_values(dtype: str) -> None:
    content, expected = BY_HAND[dtype]
    assert len(content) == TYPES[dtype].bytes
    raw = np.frombuffer(content, np.uint8)
    assert dequantize(raw, dtype, (TYPES[dtype].elements,)).tolist() == list(expected)


@pytest.mark.parametrize("exponent", [0, 1, 2, 126, 127, 128, 253, 254])
def test_every_scale_of_mxfp4_is_exact(exponent: int) -> None:
    """2^(exponent − 127), also below the normal numbers of float32; 6 · 2^127 is infinite."""
    raw = np.frombuffer(bytes([exponent]) + NIBBLES, np.uint8)
    exact = np.array([E2M1[code] * 2.0 ** (exponent - 127) for code in UP_DOWN]) + 0.0  # no −0
    with np.errstate(over="ignore"):
        assert_same_bits(dequantize(raw, "MXFP4", (32,)), exact.astype(np.float32))


# ── plain types, shapes, and wrong calls ──────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_bit_pattern_of_16_bits(dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    raw = bits.view(np.float16 if dtype == "F16" else bfloat16)
    assert_same_bits(dequantize(raw, dtype, raw.shape), theirs(bits.view(np.uint8), dtype))


def test_plain_types() -> None:
    numbers = np.array([[1.5, -0.0, np.inf], [np.nan, 1e-45, 3e38]], np.float32)
    ours = dequantize(numbers, "F32", (2, 3))
    assert_same_bits(ours, numbers)
    assert not np.shares_memory(ours, numbers)
    wide = np.array([1 / 3, 1e300, np.nan])
    with np.errstate(over="ignore"):
        assert_same_bits(dequantize(wide, "F64", (3,)), wide.astype(np.float32))


@pytest.mark.parametrize("dtype", SUPPORTED)
def test_shape_and_out(dtype: str) -> None:
    """Read-only input, three axes, and output into an array of the caller."""
    shape = (2, 3, 512)
    layout = TYPES[dtype]
    if dtype in BLOCKS:
        raw = random_blocks(dtype, 6 * 512 // layout.elements).reshape(2, 3, -1)
    else:
        plain = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": bfloat16}
        raw = np.random.default_rng(2).normal(size=shape).astype(plain[dtype])
    raw.flags.writeable = False
    ours = dequantize(raw, dtype, shape)
    assert ours.shape == shape
    assert ours.flags.writeable
    buffer = np.full((4, *shape), -1, np.float32)
    assert np.shares_memory(dequantize(raw, dtype, shape, out=buffer[1]), buffer)
    assert_same_bits(buffer[1], ours)
    assert (buffer[[0, 2, 3]] == -1).all()
    assert_same_bits(dequantize(raw[1:, ::2], dtype, (1, 2, 512)), ours[1:, ::2].copy())


@pytest.mark.parametrize("dtype", BLOCKS)
@pytest.mark.parametrize("shape", [(0,), (0, 512), (3, 0), (0, 2**40)])
def test_empty(dtype: str, shape: tuple[int, ...]) -> None:
    raw = np.zeros((*shape[:-1], 0 if 0 in shape else 1), np.uint8)
    assert dequantize(raw, dtype, shape).shape == shape


def test_wrong_calls() -> None:
    raw = np.zeros((2, 18), np.uint8)
    wrong = {
        "Q9_9": (raw, "Q9_9", (2, 32), None),
        "I8": (raw, "I8", (2, 18), None),
        "takes 54 bytes": (raw, "Q4_0", (3, 32), None),
        "whole blocks of 32": (raw, "Q4_0", (4, 16), None),
        "stored as float16": (raw, "F16", (2, 9), None),
        "stored as uint8": (raw.astype(np.int8), "Q4_0", (2, 32), None),
        "contiguous float32": (raw, "Q4_0", (2, 32), np.zeros((32, 2), np.float32).T),
        "got float64": (raw, "Q4_0", (2, 32), np.zeros((2, 32))),
    }
    for message, (given, dtype, shape, out) in wrong.items():
        with pytest.raises(FormatError, match=message):
            dequantize(given, dtype, shape, out=out)
