"""The bounds are of real work: what is counted was read and multiplied. No time is judged."""

from __future__ import annotations

import numpy as np
import pytest

from glassllama.engine import peaks
from glassllama.engine.layout import own_memory
from glassllama.engine.tiers import TIERS, features

ABLE = [name for name, dot in peaks.DOTS.items() if dot.needs <= features()]


@pytest.mark.parametrize("stream", [128, 1280])
def test_every_word_is_read_once(stream: int) -> None:
    memory = own_memory(stream * peaks.STREAMS)
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory), np.uint8)
    got = peaks.reader()(memory.ctypes.data, stream)
    assert got == memory.view(np.int64).sum()  # both go around


@pytest.mark.parametrize("name", ABLE)
def test_every_product_is_made(name: str) -> None:
    """One times one, added up, is the number of products that the rate is computed from."""
    for rounds in (1, 7):
        assert peaks.count_products(name, rounds) == rounds * peaks.DOTS[name].products


def test_every_tier_has_its_dot_products() -> None:
    assert set(peaks.TIER_DOTS) == set(TIERS)
    for tier, needed in TIERS.items():
        if needed <= features():
            assert peaks.dots_of(tier)


def test_rates_are_of_this_world() -> None:
    """Between a processor of 1990 and a thousand of today's."""
    assert 1e7 < peaks.read_bandwidth(1 << 22, 2) < 1e14
    assert 1e6 < peaks.multiply_rate(ABLE[-1], 1) < 1e15
