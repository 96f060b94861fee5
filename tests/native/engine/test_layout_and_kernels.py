"""Packed layouts and matrix kernels against the gguf package's quantization."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numba
import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from glassllama.formats.blocks import quantize
from glassllama.native.engine import gemm_kquant_amx
from glassllama.native.engine.dispatch import (
    SIGNATURE,
    TIERS,
    features,
    kernel,
    kernel_address,
    tier,
)
from glassllama.native.engine.elementwise import (
    exponential,
    quantize_blocks,
    quantize_superblock,
    tanh,
)
from glassllama.native.engine.layout import (
    FACTORS,
    Q11_BYTES,
    Q11_LO,
    Q11_SCALE,
    Q11_SUMS,
    Q11_TOTALS,
    InputFormat,
    Matrix,
    WeightType,
    allocate_matrices,
)
from glassllama.native.engine.repack import pack_matrix
from glassllama.native.jit.intrinsics import call_kernel
from long_mode import LONG
from native.engine.emulated import emulate
from native.engine.plain_packing import pack_with_numpy
from native.engine.unpacked import read_rows
from tolerances import sum_bound, unit

FLOAT_TYPES = [kind.name for kind in WeightType if kind.is_float]
RUNNABLE = [name for name, needed in TIERS.items() if needed <= features()]
ODD_SHAPES = [
    (1, 32),
    (37, 96),
    (16, 256),
    (50, 32 * 7),
    (90, 32 * 65),
]  # the last one: several groups are processed at once
CASES = [
    (kind.name, rows, columns * 8 if kind.scales.is_super else columns)
    for kind in WeightType
    for rows, columns in ODD_SHAPES
]
HALVES = {  # where the blocks have float16 numbers
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
ODD_COLUMNS = [(5, 1), (33, 3), (17, 37)]


def stored(kind: str, rows: int, columns: int) -> tuple[NDArray, NDArray[np.float32]]:
    """Random weights in the format of the file, and the numbers that they represent."""
    numbers = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    if WeightType[kind].is_float:
        raw = numbers.astype(WeightType[kind].dtype)
        return raw, raw.astype(np.float32)
    theirs = getattr(gguf.GGMLQuantizationType, kind)
    if kind in HALVES:  # gguf cannot write these types: random bytes with normal d and dmin
        block, size = gguf.GGML_QUANT_SIZES[theirs]
        raw = np.random.default_rng(rows).integers(0, 256, (rows, columns // block, size), np.uint8)
        d = np.random.default_rng(1).uniform(-0.01, 0.01, (rows, columns // block, 2))
        for n, at in enumerate(HALVES[kind]):
            raw[..., at : at + 2] = d[..., n : n + 1].astype(np.float16).view(np.uint8)
        raw = raw.reshape(rows, -1)
        return raw, gguf.quants.dequantize(raw, theirs)
    raw = gguf.quants.quantize(numbers, theirs)
    return raw, gguf.quants.dequantize(raw, theirs)


def packed(kind: str, raw: NDArray, columns: int, rows: int | None = None) -> Matrix:
    """Packed rows, or unfilled memory for `rows` rows."""
    count = len(raw) if rows is None else rows
    matrix = allocate_matrices({"": (WeightType[kind], count, columns)})[""]
    if len(raw) == 0:
        return matrix
    pack_matrix(matrix, 0, raw[:16])  # in two slices, as large tensors are packed
    if len(raw) > 16:
        pack_matrix(matrix, 16, raw[16:])
    return matrix


@njit
def call(address, arguments):  # type: ignore[no-untyped-def]
    call_kernel(address, arguments)


@njit
def encode(x, first, last, codes, factors):  # type: ignore[no-untyped-def]
    quantize_blocks(x, first, last, codes, factors)


def scales_and_starts(factors: NDArray) -> tuple[NDArray, NDArray]:
    """Factors of rows (…, blocks, FACTORS) -> (…, blocks, 2) float32 and (…, blocks, 3) int32."""
    blocks = factors.shape[-2]
    flat = factors.reshape(*factors.shape[:-2], blocks * FACTORS)
    scales, starts = flat[..., : 2 * blocks], flat[..., 2 * blocks :].view(np.int32)
    return scales.reshape(*scales.shape[:-1], -1, 2), starts.reshape(*starts.shape[:-1], -1, 3)


class Inputs(NamedTuple):
    """Rows in the format that a kernel reads, and the numbers that they represent."""

    codes: NDArray  # tokens along axis 0; of superblocks along axis 1
    factors: NDArray
    seen: NDArray[np.float64]

    def alone(self, t: int) -> Inputs:
        some = slice(t, t + 1)
        if self.codes.ndim == 3:
            return Inputs(self.codes[:, some], self.factors, self.seen[some])
        return Inputs(self.codes[some], self.factors[some], self.seen[some])


def input_format(matrix: Matrix, tier: str) -> InputFormat:
    """The input format of the matrix's kernel on that tier; for bfloat16 the float32 format."""
    if tier == "amx" and matrix.weight_type in gemm_kquant_amx.BASE:
        return InputFormat.Q11
    return matrix.weight_type.input_format


def inputs_of(matrix: Matrix, tier: str, x: NDArray[np.float32]) -> Inputs:
    """Rows (tokens, columns) in the input format of the matrix's kernel on that tier."""
    tokens, columns = x.shape
    if matrix.weight_type.is_float:
        return Inputs(x, x, x.astype(np.float64))
    if input_format(matrix, tier) is InputFormat.Q11:
        return superblocks_of(x)
    codes = np.zeros((tokens, columns), np.int8)
    factors = np.zeros((tokens, columns // 32, FACTORS), np.float32)
    for t in range(tokens):
        encode(x[t], 0, columns // 32, codes[t], factors[t])
    scales = scales_and_starts(factors)[0][..., 0]
    return Inputs(codes, factors, codes * np.repeat(scales, 32, 1).astype(np.float64))


def superblocks_of(x: NDArray[np.float32]) -> Inputs:
    """Rows in two parts, with one superblock more, because kernels read beyond the last row."""
    tokens, columns = x.shape
    codes = np.zeros((columns // 256 + 1, tokens, Q11_BYTES), np.uint8)
    for t in range(tokens):
        for n in range(columns // 256):
            encode_wide(x[t, n * 256 :], codes[n, t])
    whole = 8 * codes[:-1, :, :256].view(np.int8).astype(np.int64)
    whole += codes[:-1, :, Q11_LO : Q11_LO + 256]
    seen = whole * codes[:-1].view(np.float32)[..., Q11_SCALE // 4, None].astype(np.float64)
    return Inputs(codes, codes, seen.swapaxes(0, 1).reshape(tokens, columns))


@njit
def encode_wide(x, out):  # type: ignore[no-untyped-def]
    quantize_superblock(x.ctypes.data, out.ctypes.data)


def multiply(
    matrix: Matrix, tier: str, inputs: Inputs, first: int, last: int,
    form: InputFormat | None = None, address: int | None = None,
) -> NDArray:  # fmt: skip
    """Groups first … last-1 times all inputs, by the kernel of a tier or at an address."""
    codes, factors = inputs.codes, inputs.factors
    form = input_format(matrix, tier) if form is None else form
    out = np.full((len(inputs.seen), matrix.padded_rows), np.nan, np.float32)
    call(
        kernel_address(matrix.weight_type, tier, form) if address is None else address,
        (
            matrix.values.ctypes.data, matrix.scales.ctypes.data,
            matrix.weight_type.blocks(matrix.columns), codes.ctypes.data, codes.strides[-2],
            factors.ctypes.data, factors.strides[0], len(inputs.seen),
            out.ctypes.data, out.strides[0], first, last,
        ),
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("kind", "rows", "columns"), CASES)
def test_packing_rounds_no_number(kind: str, rows: int, columns: int) -> None:
    raw, numbers = stored(kind, rows, columns)
    matrix = packed(kind, raw, columns)
    assert (read_rows(matrix) == numbers).all()
    assert matrix.values.ctypes.data % 64 == 0
    assert matrix.scales.ctypes.data % 64 == 0


@pytest.mark.parametrize(("rows", "columns"), ODD_COLUMNS)
@pytest.mark.parametrize("kind", FLOAT_TYPES)
@pytest.mark.parametrize("tier", RUNNABLE)
def test_float_kernels_take_any_width(kind: str, rows: int, columns: int, tier: str) -> None:
    raw, numbers = stored(kind, rows, columns)
    matrix = packed(kind, raw, columns)
    x = np.random.default_rng(7).standard_normal((6, columns)).astype(np.float32)
    out = multiply(matrix, tier, inputs_of(matrix, tier, x), 0, matrix.groups)
    exact, size = products(x, numbers)
    assert (np.abs(out[:, :rows] - exact) <= sum_bound(columns, size)).all()
    assert (read_rows(matrix) == numbers).all()


def products(x: NDArray, numbers: NDArray) -> tuple[NDArray, NDArray]:
    """The exact products and the sums of the absolute values of their terms: (tokens, rows)
    float64."""
    x, numbers = x.astype(np.float64), numbers.astype(np.float64)
    return x @ numbers.T, np.abs(x) @ np.abs(numbers.T)


def terms_of(matrix: Matrix) -> int:
    """The number of rounded terms of a row's sum, for `sum_bound`.

    Integers of a block are summed exactly: 16 columns or more give two terms, for the scale and for
    the minimum, which may be twice as large as their difference; each term has a few roundings.
    """
    return 16 + matrix.columns // 4 if not matrix.weight_type.is_float else matrix.columns


@pytest.mark.parametrize("tier", TIERS)
def test_this_processor_supports_the_tier(tier: str) -> None:
    """Skipped once for each tier that cannot run here; test_tiers.py examines its machine code."""
    if tier not in RUNNABLE:
        pytest.skip(f"kernels of tier {tier}: this processor lacks them")
    assert all(kernel_address(kind, tier, kind.input_format) for kind in WeightType)


@pytest.mark.parametrize(("kind", "rows", "columns"), CASES)
@pytest.mark.parametrize("tier", RUNNABLE)
def test_kernels_against_float64(kind: str, rows: int, columns: int, tier: str) -> None:
    """Every tier is within float32 rounding of the exact sum, and so of the plain kernel."""
    raw, numbers = stored(kind, rows, columns)
    matrix = packed(kind, raw, columns)
    for tokens in (1, 3, 8, 17, 41):
        x = np.random.default_rng(7).standard_normal((tokens, columns)).astype(np.float32)
        inputs = inputs_of(matrix, tier, x)
        run = partial(multiply, matrix, tier, last=matrix.groups)
        assert faults(matrix, numbers, inputs, terms_of(matrix), run) == []


SOME = {("amx", "Q3_K"), ("amx", "MXFP4"), ("vnni", "Q2_K"), ("vnni", "IQ4_NL"), ("neon", "Q5_K"),
        ("neon", "IQ4_XS")}  # fmt: skip
EMULATED = [
    (tier, kind.name)
    for tier in ("amx", "vnni", "neon")
    for kind in WeightType
    if not kind.is_float and (LONG or (tier, kind.name) in SOME)
]


@pytest.mark.parametrize(("tier", "kind"), EMULATED)
def test_kernels_of_other_processors_with_emulated_instructions(
    tier: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for what this machine may lack: only the instructions themselves are not tested."""
    emulate(monkeypatch)
    weight_type = WeightType[kind]
    form = InputFormat.Q11 if tier == "amx" and weight_type in gemm_kquant_amx.BASE else None
    function = kernel(weight_type, tier, weight_type.input_format if form is None else form)
    compiled: Any = numba.cfunc(SIGNATURE, error_model="numpy")(function)
    for rows, columns in ((37, 512), (66, 32 * 64 + 256)):
        raw, numbers = stored(kind, rows, columns)
        matrix = packed(kind, raw, columns)
        for tokens in (1, 2, 17):
            x = np.random.default_rng(7).standard_normal((tokens, columns)).astype(np.float32)
            run = partial(multiply, matrix, tier, last=matrix.groups, address=compiled.address)
            assert faults(matrix, numbers, inputs_of(matrix, tier, x), terms_of(matrix), run) == []


def faults(
    matrix: Matrix, numbers: NDArray, inputs: Inputs, terms: int, run: Callable[..., NDArray]
) -> list[str]:
    """The faults in the products of a matrix: `run(inputs=…, first=…)` -> (tokens, rows)."""
    rows, count = len(numbers), len(inputs.seen)
    exact, size = products(inputs.seen, numbers)
    out, last = run(inputs=inputs, first=0), run(inputs=inputs, first=matrix.groups - 1)
    right = {
        "within rounding": (np.abs(out[:, :rows] - exact) <= sum_bound(terms, size)).all(),
        "padding adds nothing": (out[:, rows:] == 0).all(),
        "bit-identical alone and in every tile": all(
            (run(inputs=inputs.alone(t), first=0)[0] == out[t]).all() for t in range(count)
        ),
        "writes its groups only": np.isnan(last[:, : matrix.padded_rows - 16]).all(),
    }
    return [claim for claim, holds in right.items() if not holds]


def test_inputs_are_quantized_to_the_nearest_step() -> None:
    x = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    x[32:64] = 0
    codes, factors = np.zeros(96, np.int8), np.zeros((3, FACTORS), np.float32)
    encode(x, 0, 3, codes, factors)
    blocks = x.reshape(3, 32)
    step = np.abs(blocks).max(1) / np.float32(127)
    scales, starts = scales_and_starts(factors)
    assert (np.abs(scales[:, 0] - step) <= 2 * unit() * step).all()
    assert (np.abs(codes.reshape(3, 32) * step[:, None] - blocks) <= step[:, None] * 0.5001).all()
    low, high = codes.reshape(3, 2, 16).sum(2, dtype=np.int32).T
    total = low + high
    assert (np.abs(scales[:, 1] - step * total) <= 4 * unit() * np.abs(step * total)).all()
    assert (starts == -np.stack([total, low, high], 1)).all()


def test_superblocks_of_inputs_are_quantized_to_the_nearest_step() -> None:
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    x[1, 256:] = 0
    x[2] *= 1e-30
    codes, _, seen = superblocks_of(x)
    assert seen.shape == x.shape
    step = np.abs(x.reshape(3, 2, 256)).max(2) / np.float32(1016)
    steps = codes[:-1].view(np.float32)[..., Q11_SCALE // 4].T
    assert (np.abs(steps - step) <= 2 * unit() * step).all()
    assert (np.abs(seen - x) <= np.repeat(step, 256, 1) * 0.5001).all()
    whole = np.divide(seen, np.repeat(step, 256, 1), where=seen != 0, out=np.zeros_like(seen))
    sums = np.rint(whole).astype(int).reshape(3, 2, 16, 16).sum(-1).swapaxes(0, 1)
    assert (codes[:-1, :, Q11_TOTALS : Q11_TOTALS + 32].view(np.int16) == sums).all()
    parts = codes[:-1, :, Q11_SUMS : Q11_SUMS + 64].view(ml_dtypes.bfloat16).astype(int)
    assert (parts.reshape(2, 3, 16, 2).sum(-1) == sums).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_inputs_give_nan_or_infinite_scales(bad: float) -> None:
    x = np.ones(64, np.float32)
    x[40] = bad
    codes, factors = np.zeros(64, np.int8), np.zeros((2, FACTORS), np.float32)
    encode(x, 0, 2, codes, factors)
    scales, _ = scales_and_starts(factors)
    assert np.isfinite(scales[0]).all()
    assert not np.isfinite(scales[1, 0])
    wide = np.zeros(Q11_BYTES, np.uint8)
    encode_wide(np.tile(x, 4), wide)
    assert not np.isfinite(wide.view(np.float32)[Q11_SCALE // 4])


@pytest.mark.parametrize(
    ("kind", "rows", "columns"), [case for case in CASES if not WeightType[case[0]].is_float]
)
def test_packing_compiled_equals_packing_in_numpy(kind: str, rows: int, columns: int) -> None:
    raw, _ = stored(kind, rows, columns)
    compiled, plain = packed(kind, raw, columns), packed(kind, raw[:0], columns, rows)
    pack_with_numpy(plain, raw)
    assert (compiled.values == plain.values).all()
    assert (compiled.scales == plain.scales).all()


def codes_of(matrix: Matrix) -> NDArray[np.uint8]:
    """The codes of each row, (rows, bytes of a row's codes)."""
    lanes = matrix.values.reshape(matrix.groups, -1, 16, 4).swapaxes(1, 2)  # (G, 16, words, 4)
    return lanes.reshape(matrix.padded_rows, -1)[: matrix.rows]


def special_numbers(rows: int, columns: int) -> NDArray[np.float32]:
    """Normal numbers, zeros, equal magnitudes, steps that end in a half, very small and large
    ones."""
    chance = np.random.default_rng(rows)
    numbers = chance.standard_normal((rows, columns)).astype(np.float32)
    numbers[0, :32] = 0
    numbers[1, :32] = np.tile([2.0, -2.0], 16)
    numbers[2, :32] = -numbers[1, :32]
    numbers[3, :32] = np.arange(32) / 2
    numbers[3, 31] = 127
    numbers[4, :32] *= np.float32(1e-34)
    numbers[5, :32] *= np.float32(1e5)
    numbers[6:] *= chance.lognormal(0, 4, (rows - 6, 1)).astype(np.float32)
    return numbers


@pytest.mark.parametrize("rows", [7, 16, 50])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantization_at_load_equals_the_gguf_package_and_plain_code(kind: str, rows: int) -> None:
    numbers = special_numbers(rows, 96)
    theirs = gguf.quants.quantize(numbers, getattr(gguf.GGMLQuantizationType, kind))
    assert (theirs == quantize(numbers, kind)).all()
    wanted, ours = packed(kind, theirs, 96), packed(kind, theirs[:0], 96, rows)
    pack_matrix(ours, 0, numbers[:16])
    if rows > 16:
        pack_matrix(ours, 16, numbers[16:])
    scales = [matrix.scales.view(np.float16).astype(np.float32) for matrix in (ours, wanted)]
    assert (scales[0] == scales[1]).all()
    assert (
        codes_of(ours) == codes_of(wanted)
    ).all()  # except for the padding, whose scales are zero


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantization_at_load_keeps_nan_and_infinity(kind: str, bad: float) -> None:
    numbers = np.ones((16, 64), np.float32)
    numbers[3, 40] = bad
    matrix = packed(kind, np.zeros((0, 0), np.uint8), 64, 16)
    pack_matrix(matrix, 0, numbers)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(read_rows(matrix, 16))
    assert not finite[3, 32:].all()
    assert finite[3, :32].all()
    assert finite[:3].all()


@njit
def exponentials(x, out):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        out[i] = exponential(x[i])


def test_exponential() -> None:
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    out = np.empty_like(x)
    exponentials(x, out)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(out - exact) / exact).max() <= 4 * unit()  # 2 units in the last place
    edges = np.array([np.nan, -np.inf, -1000, 0], np.float32)
    out = np.empty_like(edges)
    exponentials(edges, out)
    assert np.isnan(out[0])
    assert (out[1:3] < 2e-38).all()
    assert out[3] == 1


@njit
def tanhs(x, out):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        out[i] = tanh(x[i])


def test_tanh() -> None:
    x = np.concatenate([np.linspace(-9, 9, 100_001), np.geomspace(1e-30, 1, 1001)])
    x, out = x.astype(np.float32), np.empty(len(x), np.float32)
    tanhs(x, out)
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(out - exact) <= 8 * unit() * np.abs(exact)).all()  # 4 units in the last place
    edges = np.array([np.nan, -np.inf, np.inf, 0], np.float32)
    out = np.empty_like(edges)
    tanhs(edges, out)
    assert np.isnan(out[0])
    assert (np.abs(out[1:3] - [-1, 1]) <= 8 * unit()).all()
    assert out[3] == 0


TILE_SHAPES = [(1, 32), (37, 96), (50, 32 * 7), (130, 32 * 65)]


@pytest.mark.skipif("amx" not in RUNNABLE, reason="this processor lacks AMX for bfloat16")
def test_bfloat_tiles_against_float64() -> None:
    """Within float32 rounding of the exact sum, and bit-identical for any number of tokens."""
    for rows, columns in TILE_SHAPES:
        raw, numbers = stored("BF16", rows, columns)
        matrix = packed("BF16", raw, columns)
        for tokens in (1, 15, 16, 17, 33, 70):
            x = np.random.default_rng(7).standard_normal((tokens, columns))
            narrow = x.astype(ml_dtypes.bfloat16)
            inputs = Inputs(narrow, narrow, narrow.astype(np.float64))
            run = partial(multiply, matrix, "amx", last=matrix.groups, form=InputFormat.BF16)
            assert faults(matrix, numbers, inputs, columns, run) == []


@pytest.mark.skipif(tier() == "plain", reason="the kernels of tier plain are ordinary loops")
def test_vectors_on_the_stack_do_not_cross_cache_lines() -> None:
    """With many registers in use kernels keep vectors on the stack: its frame is aligned."""
    kind = WeightType.Q4_1
    function = kernel(kind, tier(), kind.input_format)
    compiled: Any = numba.cfunc(SIGNATURE, error_model="numpy")(function)
    assert "alignstack=64" in compiled._library.get_llvm_str()
