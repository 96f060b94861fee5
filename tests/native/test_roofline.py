"""The roofline measures real work: the counted bytes are read, the counted products computed.

Times are not tested.
"""

from __future__ import annotations

import numpy as np
import pytest

from glassllama.native import roofline
from glassllama.native.engine.dispatch import TIERS, features
from glassllama.native.jit.memory import own_memory

ABLE = [name for name, dot in roofline.DOTS.items() if dot.needs <= features()]


@pytest.mark.parametrize("stream", [128, 1280])
def test_every_word_is_read_once(stream: int) -> None:
    memory = own_memory(stream * roofline.STREAMS)
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory), np.uint8)
    got = roofline.reader()(memory.ctypes.data, stream)
    assert got == memory.view(np.int64).sum()  # both loops wrap around


@pytest.mark.parametrize("name", ABLE)
def test_every_product_is_computed(name: str) -> None:
    """The sum of products 1 · 1 is the number of products that the rate is computed from."""
    for rounds in (1, 7):
        assert roofline.count_products(name, rounds) == rounds * roofline.DOTS[name].products


def test_every_tier_has_its_dot_products() -> None:
    assert set(roofline.TIER_DOTS) == set(TIERS)
    for tier, needed in TIERS.items():
        if needed <= features():
            assert roofline.dots_of(tier)


def test_rates_are_plausible() -> None:
    """Between a processor of 1990 and a thousand current ones."""
    assert 1e7 < roofline.read_bandwidth(1 << 22, 2) < 1e14
    assert 1e6 < roofline.multiply_rate(ABLE[-1], 1) < 1e15
