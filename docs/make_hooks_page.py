"""Write docs/hooks.md: the hooks of every architecture, with shapes, in the order of computation.

python docs/make_hooks_page.py          (a test fails if the page is not up to date)

Names and shapes come from tiny models that run once with all hooks, so they cannot be wrong. Only
the descriptions are written here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from glassllama.base.config import LlamaConfig
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.models.gemma import Gemma3
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.llama import Llama
from glassllama.models.olmo2 import Olmo2
from glassllama.walkthrough.tracing import trace
from glassllama.weights.architectures.gemma import Gemma3Config
from glassllama.weights.architectures.olmo2 import Olmo2Config

ROOT = Path(__file__).parent.parent
# All sizes differ, so that each is the size of one letter only.
SIZES: dict[str, int] = {"B": 2, "T": 7, "C": 60, "H": 6, "K": 3, "D": 10, "F": 70, "V": 31}
COMMON: dict[str, Any] = {
    "dim": SIZES["C"], "n_layers": 1, "n_heads": SIZES["H"], "ffn_dim": SIZES["F"],
    "vocab_size": SIZES["V"], "max_seq_len": 16,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "Llama": lambda: Llama(
        LlamaConfig(
            **COMMON, n_kv_heads=SIZES["K"], head_dim=SIZES["D"], norm_eps=1e-5,
            rope_theta=1e4, tie_embeddings=False,
        )
    ),
    "Gemma 3": lambda: Gemma3(
        Gemma3Config(
            **COMMON, n_kv_heads=SIZES["K"], head_dim=SIZES["D"], norm_eps=1e-6, rope_theta=1e4,
            query_scale=SIZES["D"],
        )
    ),
    "OLMo 2": lambda: Olmo2(
        Olmo2Config(
            **COMMON, n_kv_heads=SIZES["K"], head_dim=SIZES["D"], norm_eps=1e-6, rope_theta=1e4
        )
    ),
    "GPT-2": lambda: GPT(GPTConfig(**COMMON, tie_embeddings=False)),
    "Bigram": lambda: Bigram(BigramConfig(vocab_size=SIZES["V"], max_seq_len=16)),
}  # fmt: skip
PRODUCTS = {("H", "D"): "H·D", ("K", "D"): "K·D"}
DESCRIPTIONS = {
    "tok_embeddings": "row of the embedding matrix for each token",
    "pos_embeddings": "row of the matrix of learned positions for each position",
    "embeddings": "the input of the first layer: embeddings times a multiplier, or with positions",
    "layers.N": "residual stream after the layer: the input of the next one",
    "layers.N.attention_norm": "normalized input of attention",
    "layers.N.attention.wq": "queries of all heads",
    "layers.N.attention.wk": "keys of all heads",
    "layers.N.attention.wv": "values of all heads",
    "layers.N.attention.q": "queries, split into heads",
    "layers.N.attention.k": "keys, split into heads",
    "layers.N.attention.v": "values, split into heads",
    "layers.N.attention.q_norm": "normalized queries: QK-norm with weights, before RoPE",
    "layers.N.attention.k_norm": "normalized keys: QK-norm with weights, before RoPE",
    "layers.N.attention.q_rope": "queries after RoPE, and after QK-norm if configured",
    "layers.N.attention.k_rope": "keys after RoPE, and after QK-norm if configured",
    "layers.N.attention.scores": "scaled q·k before the mask; a hook replaces the fused kernel",
    "layers.N.attention.weights": "attention weights; a hook replaces the fused kernel",
    "layers.N.attention.heads": "weighted sums of values",
    "layers.N.attention.wo": "output of attention",
    "layers.N.attention": "the same tensor",
    "layers.N.post_attention_norm": "normalized output of attention",
    "layers.N.after_attention": "residual stream after attention",
    "layers.N.ffn_norm": "normalized input of the feed-forward network",
    "layers.N.feed_forward.gate": "gates before the activation",
    "layers.N.feed_forward.up": "features; without a gate, before the activation",
    "layers.N.feed_forward.gated": "activation(gate) · up",
    "layers.N.feed_forward.activated": "activation(up)",
    "layers.N.feed_forward.down": "output of the feed-forward network",
    "layers.N.feed_forward": "the same tensor",
    "layers.N.post_ffn_norm": "normalized output of the feed-forward network",
    "norm": "output of the last norm",
    "output": "logits in the dtype of the weights; no such module if the output matrix is tied",
    "last_logits": "logits, float32",
}
HEAD = """# Names of hooks

`trace(model, ids, hooks=[…])` and `llm.trace(prompt, hooks=[…])` record the outputs of hooks;
`Intervention(hook, function)` replaces them ([walkthrough](walkthrough.md#tracing-in-python)). The
name of a hook is that of its module. Patterns have wildcards: `layers.*.attention.weights` is the
attention weights of all layers, `*` everything. `nn.hooks.hook_names(model)` lists the names of a
model.

Here N is the number of a layer. Letters for shapes: B batch, T new tokens, S visible tokens (T, and
with a KV cache the cached tokens), C model width, H query heads, K KV heads, D head width, F
feed-forward width, V vocabulary. The order is that of computation. Mistral, Qwen 2, SmolLM3, Phi-3,
Granite and Gemma 1 have the hooks of a Llama and `embeddings`; Qwen 3 has `attention.q_norm` and
`attention.k_norm` besides, and Gemma 2 the norms of Gemma 3.

This page is written by `docs/make_hooks_page.py` from the models.
"""


def letters(shape: tuple[int, ...], name: str) -> str:
    """The shape in letters; S is the last axis of scores and weights."""
    by_size = {size: letter for letter, size in SIZES.items()}
    by_size |= {SIZES[a] * SIZES[b]: text for (a, b), text in PRODUCTS.items()}
    by_size[SIZES["C"]] = "C"
    if re.search(r"attention\.(w[qkv]|[qk]_norm)$", name):
        by_size[SIZES["H"] * SIZES["D"]] = "H·D"
    found = [by_size[size] for size in shape]
    if name.endswith((".scores", ".weights")):
        found[-1] = "S"
    return f"({', '.join(found)})"


def rows(model: Any) -> list[str]:
    model.initialize(torch.Generator().manual_seed(0))
    model.eval().requires_grad_(False)
    ids = torch.arange(SIZES["B"] * SIZES["T"]).reshape(SIZES["B"], SIZES["T"])
    lines = []
    for hook, tensor in trace(model, ids).items():
        name = hook.replace("layers.0", "layers.N")
        lines.append(f"| `{name}` | {letters(tuple(tensor.shape), name)} | {DESCRIPTIONS[name]} |")
    return lines


def page() -> str:
    parts = [HEAD]
    for architecture, make in MODELS.items():
        table = ["| hook | shape | tensor |", "|---|---|---|", *rows(make())]
        parts.append(f"## {architecture}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "hooks.md").write_text(page(), encoding="utf-8")
