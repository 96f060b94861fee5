"""RoPE: both implementations agree, and scores depend on relative positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glassllama.base.config import (
    GivenDivisors,
    LinearScaling,
    Llama3Scaling,
    LlamaConfig,
    rope_frequencies,
)
from glassllama.base.errors import ConfigError
from glassllama.nn.rope import ROTATE, rope_angles, rope_table, rotate_complex
from tolerances import unit

SIZES = {
    "dim": 24, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 40, "vocab_size": 11,
    "max_seq_len": 64, "norm_eps": 1e-5,
}  # fmt: skip


def config(head_dim: int, theta: float = 500_000.0, **more: object) -> LlamaConfig:
    return LlamaConfig(**SIZES, head_dim=head_dim, rope_theta=theta, **more)  # type: ignore[arg-type]


def test_first_and_last_frequencies_of_llama_3() -> None:
    f = rope_frequencies(config(128))
    np.testing.assert_allclose(f[:4], [1, 0.81462, 0.66360, 0.54058], atol=5e-6)
    assert f[-1] == pytest.approx(2.4551e-06, rel=1e-4)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_real_and_complex_implementations_agree(layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 10)
    angles = rope_angles(torch.arange(14).reshape(2, 7) * 5, torch.rand(5))
    real = ROTATE[layout](x, rope_table(angles))
    # A cosine and a sine, two products and a sum, in both.
    bound = 2 * 5 * unit() * 2 * x.abs().max()
    assert ((real - rotate_complex(x, angles, layout)).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_scores_depend_on_distance_only_and_lengths_do_not_change(layout: str) -> None:
    torch.manual_seed(1)
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    f = torch.tensor(rope_frequencies(config(16)))

    def score(i: int, j: int) -> float:
        turned = [
            ROTATE[layout](x.float(), rope_table(rope_angles(torch.tensor([[p]]), f)))
            for x, p in ((q, i), (k, j))
        ]
        assert turned[0].norm().item() == pytest.approx(q.norm().item(), rel=20 * unit())
        return (turned[0] * turned[1]).sum().item()

    # An angle of up to 42 radians is rounded by up to 42 u, on both sides; sums by a few u.
    bound = (2 * 42 + 20) * unit() * (q.norm() * k.norm()).item()
    assert score(3, 1) == pytest.approx(score(42, 40), rel=0, abs=bound)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_layouts_are_the_same_rotation_in_two_orders() -> None:
    torch.manual_seed(2)
    x, rope = torch.randn(1, 2, 5, 8), rope_table(rope_angles(torch.arange(5)[None], torch.rand(4)))
    halves = x.unflatten(-1, (4, 2)).mT.flatten(-2)  # (a0 b0 a1 b1 …) -> (a0 a1 … b0 b1 …)
    turned = ROTATE["interleaved"](x, rope).unflatten(-1, (4, 2)).mT.flatten(-2)
    assert torch.equal(ROTATE["half"](halves, rope), turned)


def test_llama3_scaling_divides_only_slow_rotations() -> None:
    plain = rope_frequencies(config(128)).astype(np.float64)
    scaled = rope_frequencies(config(128, rope_scaling=Llama3Scaling(factor=8.0)))
    ratio = plain / scaled
    wavelength = 2 * math.pi / plain
    assert np.allclose(ratio[wavelength < 8192 / 4], 1, rtol=4 * unit(), atol=0)
    assert np.allclose(ratio[wavelength > 8192], 8, rtol=4 * unit(), atol=0)
    assert np.all(np.diff(ratio) >= -1e-6)


def test_linear_and_given_divisors() -> None:
    plain = rope_frequencies(config(8))
    assert np.allclose(
        rope_frequencies(config(8, rope_scaling=LinearScaling(factor=4.0))) * 4, plain,
        rtol=4 * unit(), atol=0,
    )  # fmt: skip
    given = GivenDivisors(values=(1.0, 2.0, 4.0, 8.0))
    divided = rope_frequencies(config(8, rope_scaling=given)) * [1, 2, 4, 8]
    assert np.allclose(divided, plain, rtol=4 * unit(), atol=0)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: config(8, rope_scaling=GivenDivisors(values=(1.0, 2.0))),
        lambda: GivenDivisors(values=(1.0, math.nan)),
        lambda: LinearScaling(factor=0.0),
        lambda: Llama3Scaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0),
        lambda: config(7),
        lambda: config(8, theta=math.inf),
        lambda: LlamaConfig(**{**SIZES, "n_kv_heads": 3}, head_dim=8, rope_theta=1e4),  # type: ignore[arg-type]
        lambda: LlamaConfig(**{**SIZES, "dim": 0}, head_dim=8, rope_theta=1e4),  # type: ignore[arg-type]
    ],
)
def test_invalid_configurations_are_refused(bad: object) -> None:
    with pytest.raises(ConfigError):
        bad()  # type: ignore[operator]
