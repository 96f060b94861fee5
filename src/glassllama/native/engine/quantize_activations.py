"""Vector kernels for rows of numbers: quantisation to int8, and the weights of attention.

Written in LLVM's own vectors without any processor's instructions, so that they run everywhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from glassllama.native.jit.compile import instruction, instruction_for_constants
from glassllama.native.jit.intrinsics import types
from glassllama.native.jit.ir_builder import F32, I8, I16, I32, Vectors, vector

BLOCK = 32
PAGE = 64
INT8_MAX = 127  # int8 without -128, so that a sign can always be turned

# A row's factors, beside its codes. First two float32 for every block of 32: the scale s, and
# s · Σ codes. Then four int32 for every block: what integer sums begin with, where weights are
# stored 128, 8 or 32 too large: −128 · Σ codes and so on, for 32 of either half of the block.
SCALE, TOTAL = range(2)
CORRECTION_128, CORRECTION_8, CORRECTION_32_LOW, CORRECTION_32_HIGH = range(4)
SCALE_BYTES, CORRECTION_BYTES = 8, 16  # of a block
FACTORS = (SCALE_BYTES + CORRECTION_BYTES) // 4

# 256 numbers in two digits, with one scale s: each is s · (8 · X + Y). See gemm_kquant_amx.py.
SUPERBLOCK, LOW_STEPS, Q11_STEPS = 256, 8, 8 * INT8_MAX
Q11_X, Q11_Y = 0, 320  # bytes; X and Y of all rows are equally far apart, as a tile wants them
Q11_SUMS = 256  # Σ of each half block in two bfloat16 that add up to it
Q11_TOTALS = 576  # the same as int16
Q11_SCALE = 608
Q11_BYTES = 2 * (Q11_Y - Q11_X)

LOG2_E = 1.4426950408889634
LN2_UPPER = 0.693359375  # few bits: its product with a whole number is exact
LN2_LOWER = -2.12194440e-4
LOWEST, HIGHEST = -87.3, 88.3  # e^x beyond these is no normal float32
TAYLOR = [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0]


def exponential(v: Vectors, x: Any) -> Any:
    """e^x in every lane, as in elementwise.py: NaN stays NaN."""
    b, kind = v.builder, x.type
    for bound, beyond in ((LOWEST, "<"), (HIGHEST, ">")):
        x = b.select(b.fcmp_ordered(beyond, x, v.same(kind, bound)), v.same(kind, bound), x)
    n = v.rounded(b.fmul(x, v.same(kind, LOG2_E)))
    r = v.fused(n, v.same(kind, -LN2_LOWER), v.fused(n, v.same(kind, -LN2_UPPER), x))
    p = v.same(kind, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        p = v.fused(p, r, v.same(kind, coefficient))
    whole = vector(I32, kind.count)
    exponent = b.add(b.fptosi(n, whole), v.same(whole, 127))
    return b.fmul(p, b.bitcast(b.shl(exponent, v.same(whole, 23)), kind))


def lanes(start: int, count: int) -> Any:
    return ir.Constant(vector(I32, count), list(range(start, start + count)))


@instruction
def quantize_block(context, x, codes, factors, corrections):  # type: ignore[no-untyped-def]
    """32 numbers as int8 codes, with the block's factors and corrections.

    The largest magnitude is found on the bits, where NaN and infinity are largest too: the scale
    carries them into every product, instead of losing them among integers.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, codes, factors, corrections = arguments
        v, b = Vectors(builder), builder
        x = v.load(address, vector(F32, BLOCK), 4)
        words = vector(I32, BLOCK)
        magnitudes = b.and_(b.bitcast(x, words), v.same(words, 0x7FFFFFFF))
        largest = b.bitcast(v.reduce("umax", magnitudes), F32)
        scale, inverse = scale_of(v, largest, INT8_MAX)
        q = b.fptosi(v.rounded(b.fmul(x, v.splat(inverse, BLOCK))), words)
        v.store(b.trunc(q, vector(I8, BLOCK)), codes, 1)
        low, high = sums_of_halves(v, q)
        total = b.add(low, high)
        v.store(scale, v.at(factors, 4 * SCALE), 4)
        v.store(b.fmul(scale, b.sitofp(total, F32)), v.at(factors, 4 * TOTAL), 4)
        for place, some, times in (
            (CORRECTION_128, total, 128), (CORRECTION_8, total, 8), (CORRECTION_32_LOW, low, 32),
            (CORRECTION_32_HIGH, high, 32),
        ):  # fmt: skip
            v.store(b.mul(some, ir.Constant(I32, -times)), v.at(corrections, 4 * place), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


def scale_of(v: Vectors, largest: Any, steps: int) -> tuple[Any, Any]:
    """The scale of numbers up to `largest` in so many steps, and what makes steps of them."""
    b, nothing, most = v.builder, ir.Constant(F32, 0.0), ir.Constant(F32, float(steps))
    usable = b.fcmp_ordered(">", largest, nothing)
    return b.fdiv(largest, most), b.select(usable, b.fdiv(most, largest), nothing)


def sums_of_halves(v: Vectors, q: Any) -> tuple[Any, Any]:
    """Of a block's whole numbers: the first sixteen, and the others."""
    b, half = v.builder, BLOCK // 2
    low, high = (b.shuffle_vector(q, q, lanes(start, half)) for start in (0, half))
    return v.reduce("add", low), v.reduce("add", high)


@instruction
def quantize_superblock(context, x, out):  # type: ignore[no-untyped-def]
    """256 numbers in two digits, with their sums and scale."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, out = arguments
        v, b, words = Vectors(builder), builder, vector(I32, BLOCK)
        blocks = range(SUPERBLOCK // BLOCK)
        numbers = [v.load(v.at(address, 4 * BLOCK * n), vector(F32, BLOCK), 4) for n in blocks]
        sizes = [b.and_(b.bitcast(x, words), v.same(words, 0x7FFFFFFF)) for x in numbers]
        size = sizes[0]
        for other in sizes[1:]:
            size = b.select(b.icmp_unsigned(">", size, other), size, other)
        largest = b.bitcast(v.reduce("umax", size), F32)
        scale, inverse = scale_of(v, largest, Q11_STEPS)
        v.store(scale, v.at(out, Q11_SCALE), 4)
        for n, x in enumerate(numbers):
            q = b.fptosi(v.rounded(b.fmul(x, v.splat(inverse, BLOCK))), words)
            upper, lower = b.ashr(q, v.same(words, 3)), b.and_(q, v.same(words, LOW_STEPS - 1))
            v.store(b.trunc(upper, vector(I8, BLOCK)), v.at(out, Q11_X + BLOCK * n), 1)
            v.store(b.trunc(lower, vector(I8, BLOCK)), v.at(out, Q11_Y + BLOCK * n), 1)
            for k, total in enumerate(sums_of_halves(v, q)):
                half = 2 * n + k
                v.store(b.trunc(total, I16), v.at(out, Q11_TOTALS + 2 * half), 2)
                v.store(two_bfloats(b, total), v.at(out, Q11_SUMS + 4 * half), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), emit


def two_bfloats(b: Any, whole: Any) -> Any:
    """A whole number of up to 16 bits as two bfloat16 in a word, whose sum it is."""
    byte = ir.Constant(I32, 255)
    lower = b.and_(whole, byte)
    upper = b.sub(whole, lower)
    first, second = (b.bitcast(b.sitofp(part, F32), I32) for part in (upper, lower))
    return b.or_(b.lshr(first, ir.Constant(I32, 16)), second)


@instruction
def squares(context, x, count):  # type: ignore[no-untyped-def]
    """The sum of the squares of 16 · `count` ≥ 16 numbers: sixteen running sums, then halving.

    The order is written out. Left to the compiler, it differs between code just compiled and the
    same code from disk, and so would every logit.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, count = arguments
        v, some = Vectors(builder), vector(F32, 16)

        def add(n: Any, sums: list[Any]) -> list[Any]:
            x = v.load(v.step(address, n, 64), some, 4)
            return [v.fused(x, x, sums[0])]

        return v.total(v.count_up(count, [v.same(some, 0.0)], add)[0])

    return types.float32(types.int64, types.int64), emit


@instruction_for_constants
def softmax_page_tile(  # type: ignore[no-untyped-def]
    context, scaled, scores, visible, part, width, scales
):
    """A page's scores become weights e^(score − largest so far), 0 where not visible.

    If `scaled`, a constant, `scales` holds what a step of every token's key stands for, and of its
    value: scores are taken times the first, and weights, once summed, times the second. `part` ends
    in the largest score and the sum of weights so far: both are brought up to date. Returns by how
    much what was summed before must shrink. At least one token is visible.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, visible, part, width, scales = arguments[1:]
        v, b, page = Vectors(builder), builder, vector(F32, PAGE)
        seen = b.icmp_signed("<", lanes(0, PAGE), v.splat(b.trunc(visible, I32), PAGE))
        scores = v.load(address, page, 4)
        if scaled.literal_value:
            scores = b.fmul(scores, v.load(scales, page, 4))
        ends = v.step(part, width, 4)
        before = v.load(ends, F32, 4)
        here = v.largest(b.select(seen, scores, v.same(page, float("-inf"))))
        top = b.select(b.fcmp_ordered(">", before, here), before, here)
        weights = exponential(v, b.fsub(scores, v.splat(top, PAGE)))
        weights = b.select(seen, weights, v.same(page, 0.0))
        kept = weights
        if scaled.literal_value:
            kept = b.fmul(weights, v.load(v.at(scales, 4 * PAGE), page, 4))
            kept = b.select(seen, kept, v.same(page, 0.0))
        v.store(kept, address, 4)
        shrink = exponential(v, v.splat(b.fsub(before, top), 4))
        shrink = b.extract_element(shrink, ir.Constant(I32, 0))
        total = v.fused(v.load(v.at(ends, 4), F32, 4), shrink, v.total(weights))
        v.store(top, ends, 4)
        v.store(total, v.at(ends, 4), 4)
        return shrink

    return types.float32(scaled, *[types.int64] * 5), emit
