"""Meta's text models as configurations: LLaMA, Llama 2, 3, 3.1, 3.2 and 3.3. Data, no weights.

A generation shares tokenizer, context and RoPE; its models add their sizes. Each generation names
the paper or model card of its numbers; norm_eps and the factors of the RoPE scaling are in the
params.json and config.json files that were published with the weights. make_compare.py writes
docs/compare.md from this table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glassllama.base.config import Llama3Scaling, LlamaConfig, RopeScaling
from glassllama.formats.blocks import BLOCKS, TYPES
from glassllama.weights.architectures.llama import LLAMA


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of one model."""

    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    n_kv_heads: int | None = None  # None: n_heads
    norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Values that the models of one release share, and their sizes."""

    name: str
    short: str  # beginning of the names in MODELS
    released: str
    source: str
    tokenizer: str
    vocab_size: int
    context: int  # tokens
    rope_theta: float
    models: dict[str, Sizes]  # "8B" -> its sizes
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False

    def config(self, size: str) -> LlamaConfig:
        """The config of one of its models, in Hugging Face's RoPE layout."""
        sizes = self.models[size]
        return LlamaConfig(
            dim=sizes.dim,
            n_layers=sizes.n_layers,
            n_heads=sizes.n_heads,
            n_kv_heads=sizes.n_heads if sizes.n_kv_heads is None else sizes.n_kv_heads,
            head_dim=sizes.dim // sizes.n_heads,
            ffn_dim=sizes.ffn_dim,
            vocab_size=self.vocab_size,
            max_seq_len=self.context,
            norm_eps=sizes.norm_eps,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            tie_embeddings=self.tie_embeddings,
        )


SENTENCEPIECE = "SentencePiece BPE, unknown characters as bytes"
TIKTOKEN = "byte-level BPE (tiktoken)"
LLAMA3_VOCABULARY = 128_256  # 128,000 pieces and 256 special tokens

SIZE_8B = Sizes(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14_336)
SIZE_70B = Sizes(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28_672)
SIZE_405B = Sizes(dim=16_384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53_248)

GENERATIONS = (
    Generation(
        name="LLaMA",
        short="llama1",
        released="February 2023",
        source=(
            "LLaMA: Open and Efficient Foundation Language Models (Touvron et al., 2023), table 2 "
            "and section 2.2; its context in table 1 of the paper on Llama 2"
        ),
        tokenizer=SENTENCEPIECE,
        vocab_size=32_000,
        context=2048,
        rope_theta=10_000.0,
        models={
            "7B": Sizes(dim=4096, n_layers=32, n_heads=32, ffn_dim=11_008, norm_eps=1e-6),
            "13B": Sizes(dim=5120, n_layers=40, n_heads=40, ffn_dim=13_824, norm_eps=1e-6),
            "33B": Sizes(dim=6656, n_layers=60, n_heads=52, ffn_dim=17_920, norm_eps=1e-6),
            "65B": Sizes(dim=8192, n_layers=80, n_heads=64, ffn_dim=22_016),
        },
    ),
    Generation(
        name="Llama 2",
        short="llama2",
        released="July 2023",
        source=(
            "Llama 2: Open Foundation and Fine-Tuned Chat Models (Touvron et al., 2023), table 1 "
            "and section 2.2"
        ),
        tokenizer=SENTENCEPIECE,
        vocab_size=32_000,
        context=4096,
        rope_theta=10_000.0,
        models={
            "7B": Sizes(dim=4096, n_layers=32, n_heads=32, ffn_dim=11_008),
            "13B": Sizes(dim=5120, n_layers=40, n_heads=40, ffn_dim=13_824),
            "70B": SIZE_70B,
        },
    ),
    Generation(
        name="Llama 3",
        short="llama3",
        released="April 2024",
        source="the Llama 3 model card; The Llama 3 Herd of Models (2024), table 3",
        tokenizer=TIKTOKEN,
        vocab_size=LLAMA3_VOCABULARY,
        context=8192,
        rope_theta=500_000.0,
        models={"8B": SIZE_8B, "70B": SIZE_70B},
    ),
    Generation(
        name="Llama 3.1",
        short="llama3.1",
        released="July 2024",
        source="The Llama 3 Herd of Models (2024), table 3; the Llama 3.1 model card",
        tokenizer=TIKTOKEN,
        vocab_size=LLAMA3_VOCABULARY,
        context=131_072,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(factor=8.0),
        models={"8B": SIZE_8B, "70B": SIZE_70B, "405B": SIZE_405B},
    ),
    Generation(
        name="Llama 3.2",
        short="llama3.2",
        released="September 2024",
        source="the Llama 3.2 model card",
        tokenizer=TIKTOKEN,
        vocab_size=LLAMA3_VOCABULARY,
        context=131_072,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(factor=32.0),
        tie_embeddings=True,
        models={
            "1B": Sizes(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192),
            "3B": Sizes(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192),
        },
    ),
    Generation(
        name="Llama 3.3",
        short="llama3.3",
        released="December 2024",
        source="the Llama 3.3 model card",
        tokenizer=TIKTOKEN,
        vocab_size=LLAMA3_VOCABULARY,
        context=131_072,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(factor=8.0),
        models={"70B": SIZE_70B},
    ),
)

# "llama3.1-8b" -> its configuration; the same short names as in hub/names.py.
MODELS = {
    f"{generation.short}-{size.lower()}": generation.config(size)
    for generation in GENERATIONS
    for size in generation.models
}


def parameters(config: LlamaConfig) -> int:
    """Number of parameters; tied embeddings count once."""
    return sum(math.prod(shape) for shape in LLAMA.shapes(config).values())


def weight_bytes(config: LlamaConfig, dtype: str) -> int:
    """Bytes of the weights with all matrices as `dtype`; beside block types, norms are F32."""
    total = 0
    for shape in LLAMA.shapes(config).values():
        stored = "F32" if len(shape) == 1 and dtype in BLOCKS else dtype
        layout = TYPES[stored]
        total += math.prod(shape) // layout.elements * layout.bytes
    return total
