"""An architecture that the package does not know: the walkthrough needs its layer plan only.

It has what no family has: biases of all matrices, a norm of queries and keys with weights after
RoPE, norms before attention and after the feed-forward network, and a window in a layer without
positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from glassllama.base.config import WindowedConfig
from glassllama.base.layer_plan import (
    AttentionPlan,
    BlockPlan,
    FeedForwardPlan,
    ModelPlan,
    rope_plan,
)
from glassllama.formats.safetensors import open_safetensors
from glassllama.models.decoder import Decoder, with_window
from glassllama.nn.attention import Attention, ForwardContext
from glassllama.nn.feed_forward import FeedForward
from glassllama.nn.hooks import HookPoint
from glassllama.nn.norm import RMSNorm
from glassllama.walkthrough.mistakes import MISTAKES, compare_with_mistake
from glassllama.walkthrough.walkthrough import Walkthrough, open_walkthrough
from glassllama.weights.architectures import decoder
from glassllama.weights.architectures.description import Architecture
from glassllama.weights.checkpoint import Checkpoint
from walkthrough.conftest import run_all_steps

IDS = [n * 7 % 37 for n in range(11)]


@dataclass(frozen=True, kw_only=True)
class OddConfig(WindowedConfig):
    architecture: ClassVar[str] = "odd"


class OddAttention(Attention):
    """Biases everywhere; q and k are normalized after RoPE."""

    def __init__(self, config: OddConfig, layer: int) -> None:
        super().__init__(config, layer, bias=True)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def encode_positions(self, q: Tensor, k: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        q, k = super().encode_positions(q, k, context)
        return self.q_norm(q), self.k_norm(k)


class OddBlock(nn.Module):
    """A norm before attention and one after the feed-forward network."""

    def __init__(self, config: OddConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = OddAttention(config, layer)
        self.after_attention = HookPoint()
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        for name, (out, width) in {"gate": (70, 48), "up": (70, 48), "down": (48, 70)}.items():
            setattr(self.feed_forward, name, nn.Linear(width, out))
        self.post_ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = self.after_attention(x + self.attention(self.attention_norm(x), context))
        return x + self.post_ffn_norm(self.feed_forward(x))


class Odd(Decoder):
    config: OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config, lambda n: OddBlock(config, n))

    def context_of(self, layer: int, context: ForwardContext, positions: Tensor) -> ForwardContext:
        window = self.config.window(layer)
        context = replace(context, rope=None) if window else context
        return with_window(context, positions, window)


def odd_plan(config: OddConfig) -> ModelPlan:
    windows = [config.window(n) for n in range(config.n_layers)]
    attentions = [
        AttentionPlan(
            n_heads=6, n_kv_heads=2, head_dim=10, scale=10**-0.5, window=window,
            rope=None if window else rope_plan(config), qk_norm="per_head",
            qk_norm_after_rope=True, biases=frozenset("qkvo"),
        )
        for window in windows
    ]  # fmt: skip
    blocks = [
        BlockPlan(
            attention=attention, feed_forward=FeedForwardPlan(ffn_dim=70, bias=True),
            norms=frozenset({"pre_attention", "post_ffn"}),
        )
        for attention in attentions
    ]  # fmt: skip
    return ModelPlan(
        dim=48, vocab_size=37, max_seq_len=64, norm_eps=1e-5, blocks=tuple(blocks),
        tie_embeddings=False,
    )  # fmt: skip


NORMS = {name: (name, name) for name in ("attention_norm", "post_ffn_norm")}
BIASES = {"attention.wo": "C", "feed_forward.gate": "F", "feed_forward.up": "F",
          "feed_forward.down": "C"}  # fmt: skip
ODD = Architecture(
    name="odd", title="Odd", hf_classes={}, config_from_hf=lambda _: None,  # type: ignore[arg-type, return-value]
    config_to_hf=lambda _: {}, extras={}, model="", layer_plan=odd_plan,
    rules=(
        *decoder.decoder_rules(norms=NORMS, qk_norm=("D", "D"), qkv_bias=True),
        *(decoder.in_layer(name, name, name, "", size, kind="bias")
          for name, size in BIASES.items()),
    ),
)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Checkpoint, Odd]:
    """A random model, and a file with its weights."""
    config = OddConfig(
        dim=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=70, vocab_size=37,
        max_seq_len=64, norm_eps=1e-5, rope_theta=1e4, sliding_window=4,
        window_layers=(False, True, False),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Odd(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    mapped = {tensor.ours: tensor for tensor in ODD.tensors(config, "hf")}
    tensors = {mapped[name].theirs: p for name, p in model.named_parameters()}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    opened = Checkpoint(
        path=path, file_format="hf", architecture=ODD, config=config, file=open_safetensors(path),
        tensors=mapped,
    )  # fmt: skip
    return opened, model


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_all_steps(layer: int, checkpoint: tuple[Checkpoint, Odd]) -> None:
    walk: Walkthrough = open_walkthrough(checkpoint[0], IDS, model=checkpoint[1], layer=layer)
    steps = run_all_steps(walk)
    assert ("No positions" in steps[8].title) == (layer == 1)
    assert ("sliding window of 4 tokens" in steps[9].text) == (layer == 1)
    assert "normalized by post_ffn_norm and then" in steps[11].text
    assert "(70" not in steps[3].text
    for mistake in MISTAKES.values():
        assert max(compare_with_mistake(walk, mistake).divergence) > 1e-3
