"""The vector kernels of attention and of rows against NumPy and plain loops."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from glassllama.native.engine import attention_kernels, elementwise
from glassllama.native.engine.attention_kernels import LANES, score_tile
from glassllama.native.engine.dispatch import features
from glassllama.native.engine.layout import ITEM_BYTES, KV_FLOAT32, KV_INT8, KV_INT16, PAGE
from tolerances import sum_bound, unit

LESSER_RUN = (
    "GLASSLLAMA_LESSER" in os.environ
)  # whether this file runs in a new process: see its end
COUNTS = [1, 4, 7, 25] if LESSER_RUN else [1, 2, 3, 4, 5, 6, 7, 9, 11, 24, 25]
WIDTHS = [1, 20, 64, 130] if LESSER_RUN else [1, 16, 20, 40, 48, 64, 80, 96, 128, 130, 256]
STEPS = {KV_INT8: 127, KV_INT16: 32767}
HALVES = (slice(32), slice(16), slice(16, 32))  # and a whole block
VISIBLE = [*range(4), 15, 16, 17, 31, 40, 63, 64]


@njit
def unpack(source, count, target, ahead, kind):  # type: ignore[no-untyped-def]
    attention_kernels.convert_page(source, count, target, ahead, kind)


@njit
def score(queries, count, keys, width, scores, kind=KV_FLOAT32):  # type: ignore[no-untyped-def]
    attention_kernels.score_page(queries, count, keys, width, scores, 4096, kind)


@njit
def score_few_registers(queries, keys, width, scores):  # type: ignore[no-untyped-def]
    for part in range(0, PAGE * 4, LANES * 4):
        score_tile(KV_FLOAT32, 4, LANES, queries, keys + part, width, scores + part, 0)


@njit
def mix(weights, count, values, width, parts, kind=KV_FLOAT32):  # type: ignore[no-untyped-def]
    attention_kernels.accumulate_values(weights, count, values, width, parts, 4096, kind)


@njit
def weigh(scores, visible, part, width, scales=0, kind=KV_FLOAT32):  # type: ignore[no-untyped-def]
    attention_kernels.softmax_page(scores, visible, part, width, scales, kind)


@njit
def store(key, value, keys, values, scales, slot, kind):  # type: ignore[no-untyped-def]
    attention_kernels.store_kv(key, value, keys, values, scales, slot, kind)


@njit
def encode_block(x, codes, factors, starts):  # type: ignore[no-untyped-def]
    elementwise.quantize_block(x, codes, factors, starts)


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def at(array: NDArray[Any]) -> int:
    return array.ctypes.data


def sizes(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """The sums of the absolute values of a product's terms, for `sum_bound`."""
    return np.abs(one).astype(np.float64) @ np.abs(other)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", [KV_INT16, KV_INT8])
def test_unpack(kind: int, width: int) -> None:
    stored = narrow(kind, 2 * width * PAGE)
    target, count = np.full(width * PAGE, np.nan, np.float32), width * PAGE
    unpack(at(stored), count, at(target), count * ITEM_BYTES[kind], kind)
    assert (target == stored[:count].astype(np.float32)).all()


def narrow(kind: int, count: int) -> NDArray[Any]:
    steps = STEPS[kind]
    numbers = np.random.default_rng(count).integers(-steps, steps + 1, count)
    return numbers.astype(np.int8 if kind == KV_INT8 else np.int16)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("width", [16, 48, 64, 128])
@pytest.mark.parametrize("kind", [KV_INT16, KV_INT8])
def test_unpacking_during_or_before_the_product_is_bit_identical(
    kind: int, width: int, count: int
) -> None:
    """The number of queries decides which of the two is used."""
    keys, values = narrow(kind, width * PAGE), narrow(kind, PAGE * width)[::-1].copy()
    wide_keys, wide_values = keys.astype(np.float32), values.astype(np.float32)
    queries, (before, way) = random(count, width), np.zeros((2, count, PAGE), np.float32)
    score(at(queries), count, at(wide_keys), width, at(before))
    score(at(queries), count, at(keys), width, at(way), kind)
    assert (before == way).all()
    assert before.any()
    ours, theirs = np.zeros((2, count, width + 2), np.float32)
    mix(at(before), count, at(wide_values), width, at(theirs))
    mix(at(before), count, at(values), width, at(ours), kind)
    assert (ours == theirs).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
def test_score(count: int, width: int) -> None:
    queries, keys = random(count, width), random(width, PAGE)
    scores = np.full((count + 1, PAGE), 7.0, np.float32)
    score(at(queries), count, at(keys), width, at(scores))
    plain = np.zeros((count, PAGE), np.float64)
    for i in range(width):
        plain += queries[:, i, None].astype(np.float64) * keys[i]
    assert (np.abs(scores[:count] - plain) <= sum_bound(width, sizes(queries, keys))).all()
    assert (scores[count] == 7).all(), "written beyond the last query"


@pytest.mark.parametrize("count", COUNTS)
def test_a_query_is_bit_identical_for_any_number_of_other_queries(count: int) -> None:
    width = 80
    queries, keys, values = random(count, width), random(width, PAGE), random(PAGE, width)
    together, alone = np.zeros((2, count, PAGE), np.float32)
    score(at(queries), count, at(keys), width, at(together))
    for n in range(count):
        score(at(queries[n]), 1, at(keys), width, at(alone[n]))
    assert (together == alone).all()
    parts, single = np.zeros((2, count, width + 2), np.float32)
    mix(at(together), count, at(values), width, at(parts))
    for n in range(count):
        mix(at(together[n]), 1, at(values), width, at(single[n]))
    assert (parts == single).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_tiles_for_processors_with_few_registers(width: int) -> None:
    queries, keys = random(4, width), random(width, PAGE)
    wide, narrow = np.zeros((2, 4, PAGE), np.float32)
    score(at(queries), 4, at(keys), width, at(wide))
    score_few_registers(at(queries), at(keys), width, at(narrow))
    assert (wide == narrow).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
def test_accumulate_values(count: int, width: int) -> None:
    weights, values = random(count, PAGE), random(PAGE, width)
    parts = random(count + 1, width + 2)
    before = parts.copy()
    mix(at(weights), count, at(values), width, at(parts))
    plain = before[:count, :width].astype(np.float64)
    for s in range(PAGE):
        plain += weights[:, s, None].astype(np.float64) * values[s]
    bound = sum_bound(PAGE + 1, sizes(weights, values) + np.abs(before[:count, :width]))
    assert (np.abs(parts[:count, :width] - plain) <= bound).all()
    assert (parts[:, width:] == before[:, width:]).all()
    assert (parts[count] == before[count]).all(), "written beyond the last query"


def plain_softmax_page(scores: NDArray, visible: int, part: NDArray) -> tuple[NDArray, NDArray]:
    """Softmax with a running maximum, one more page, in float64."""
    sums, top, total = part[:-2].astype(np.float64), float(part[-2]), float(part[-1])
    weights = np.zeros(PAGE)
    for s in range(visible):
        top = max(top, float(scores[s]))
    shrink = np.exp(float(part[-2]) - top) if visible > 0 else 1.0
    for s in range(visible):
        weights[s] = np.exp(float(scores[s]) - top)
    return weights, np.array([*sums * shrink, top, total * shrink + weights.sum()])


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [KV_FLOAT32, KV_INT16])
def test_softmax_page(kind: int, visible: int, first: bool) -> None:
    """Scales of empty slots may have any value, because they are not used."""
    width = 40
    scores, part = 4 * random(PAGE), np.abs(random(width + 2))
    scales = np.abs(random(2, PAGE)) if kind == KV_INT16 else np.ones((2, PAGE), np.float32)
    scales[:, visible:] = np.nan
    if first:  # no key has been processed yet
        part[:] = 0
        part[width] = -np.inf
    ours, ended = scores.copy(), part.copy()
    weigh(at(ours), visible, at(ended), width, at(scales), kind)
    scaled = scores * np.nan_to_num(scales[0])
    weights, theirs = plain_softmax_page(scaled, visible, part)
    weights *= np.nan_to_num(scales[1])
    assert (ours[visible:] == 0).all()
    # The error of a power: the rounding of its argument (a product and a difference), and 4 u.
    power = unit() * (2 * np.abs(scaled).max() + 8)
    assert (np.abs(ours - weights) <= power * np.abs(weights).max()).all()
    if visible or not first:
        largest = np.abs(theirs[np.isfinite(theirs)]).max()
        assert (np.abs(ended - theirs) <= (power + sum_bound(PAGE, 1.0)) * largest).all()
    else:
        assert (ended == part).all()


@pytest.mark.parametrize("trouble", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("slot", [0, 17, 63])
def test_softmax_page_keeps_nan(trouble: float, slot: int) -> None:
    scores, part = random(PAGE), np.zeros(18, np.float32)
    part[16] = -np.inf
    scores[slot] = trouble
    weigh(at(scores), PAGE, at(part), 16)
    if trouble == -np.inf:
        assert scores[slot] <= 1e-37
        assert np.isfinite(part).all()
    else:
        assert np.isnan(part[17]), "the output is divided by the sum of weights"
        assert np.isnan(scores[slot])


def test_softmax_page_ignores_nan_in_masked_slots() -> None:
    scores, part = random(PAGE), np.zeros(18, np.float32)
    part[16] = -np.inf
    scores[20:] = np.nan
    weigh(at(scores), 20, at(part), 16)
    assert np.isfinite(scores).all()
    assert np.isfinite(part).all()


@pytest.mark.parametrize("width", [1, 40, 64, 130])
@pytest.mark.parametrize("kind", [KV_INT16, KV_INT8, KV_FLOAT32])
def test_store_then_unpack(kind: int, width: int) -> None:
    """Every slot of a page is read back exactly, or within half a step."""
    keys, values = random(PAGE, width), 3 * random(PAGE, width)
    raw = np.zeros((2, width * PAGE * ITEM_BYTES[kind]), np.uint8)
    scales = np.zeros((2, PAGE), np.float32)
    for slot in range(PAGE):
        places = (at(raw[0]), at(raw[1]), at(scales))
        store(keys[slot], values[slot], *places, slot, kind)
    for number, (stored, wanted) in enumerate(zip(raw, (keys, values), strict=True)):
        out = np.zeros(width * PAGE, np.float32)
        if kind == KV_FLOAT32:
            out = stored.view(np.float32)
        else:
            unpack(at(stored), width * PAGE, at(out), 0, kind)
        got = out.reshape(width, PAGE).T if number == 0 else out.reshape(PAGE, width)
        if kind != KV_FLOAT32:
            largest, most = np.abs(wanted).max(axis=1), STEPS[kind]
            assert (np.abs(scales[number] * most - largest) <= 3 * unit() * largest).all()
            got = got * scales[number][:, None]
            assert (np.abs(got - wanted) <= largest[:, None] / (2 * most) * 1.01).all()
        else:
            assert (got == wanted).all()


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-37, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("kind", [KV_INT16, KV_INT8])
def test_numbers_of_any_size_are_stored_within_half_a_step(kind: int, size: float) -> None:
    """No number is too large or too small; very small ones have an error near 0."""
    wanted = np.linspace(-size, size, 16, dtype=np.float32)
    raw, scales = np.zeros((2, 16 * PAGE * 2), np.uint8), np.zeros((2, PAGE), np.float32)
    store(wanted, wanted, at(raw[0]), at(raw[1]), at(scales), 3, kind)
    steps = raw[1].view(np.int8 if kind == KV_INT8 else np.int16)[: 16 * PAGE].reshape(PAGE, 16)[3]
    got = steps * scales[1, 3]
    assert np.abs(got - wanted).max() <= max(size / STEPS[kind] * 0.51, 1e-35)
    assert (scales[0] == scales[1]).all()


@pytest.mark.parametrize("trouble", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [KV_INT16, KV_INT8])
def test_integer_pages_keep_nan(kind: int, trouble: float) -> None:
    key, value = random(16), np.zeros(16, np.float32)
    key[5] = trouble
    raw, scales = np.zeros((2, 16 * PAGE), np.int16), np.zeros((2, PAGE), np.float32)
    store(key, value, at(raw[0]), at(raw[1]), at(scales), 3, kind)
    assert not np.isfinite(scales[0, 3])
    assert scales[1, 3] == 0
    scores, part = np.zeros(PAGE, np.float32), np.zeros(18, np.float32)
    weigh(at(scores), PAGE, at(part), 16, at(scales), kind)
    assert np.isnan(part[17])


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_encode_block(size: float) -> None:
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal(32).astype(np.float32) * np.float32(size)
        codes, factors = np.zeros(32, np.int8), np.zeros(2, np.float32)
        starts = np.zeros(4, np.int32)
        encode_block(at(x), at(codes), at(factors), at(starts))
        inverse = np.float32(127) / np.abs(x).max()
        assert (codes == np.rint(x * inverse)).all()
        assert factors[0] == np.abs(x).max() / np.float32(127)
        total, low, high = (codes[some].sum(dtype=int) for some in HALVES)
        assert factors[1] == factors[0] * np.float32(total)
        assert starts.tolist() == [-total, -low, -high, 0]


@pytest.mark.parametrize("trouble", [np.nan, np.inf, -np.inf, 0.0])
def test_encode_block_of_special_numbers(trouble: float) -> None:
    x = np.full(32, trouble, np.float32) if trouble == 0 else random(32)
    x[9] = trouble
    codes, factors = np.zeros(32, np.int8), np.zeros(2, np.float32)
    encode_block(at(x), at(codes), at(factors), at(np.zeros(4, np.int32)))
    if trouble == 0:
        assert not codes.any()
        assert not factors.any()
    else:
        assert not np.isfinite(factors[0]), "the scale passes it to every product"


LESSER = {"haswell": "+avx2,+fma,+f16c,+sse4.2", "x86-64": "+sse2"}


@pytest.mark.portable
@pytest.mark.parametrize("processor", LESSER)
def test_on_processors_with_fewer_instructions(processor: str) -> None:
    """This file again with fewer sizes, compiled for processors with fewer instructions than this
    one."""
    if "sse2" not in features():
        pytest.skip("not x86-64: no processors with fewer instructions are known")
    if processor == "haswell" and "avx512f" not in features():
        pytest.skip("no AVX-512: the other tests of this file already use AVX2")
    environment = {
        **os.environ, "GLASSLLAMA_LESSER": "1",
        "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": LESSER[processor],
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:]
