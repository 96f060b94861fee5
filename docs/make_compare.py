"""Write docs/compare.md: what changed from LLaMA to Llama 3.3, drawn from our own presets.

python docs/make_compare.py          (a test fails while the page is stale)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from glassllama.base.config import Llama3Scaling, LlamaConfig, kv_bytes
from glassllama.weights.presets import GENERATIONS, Generation, parameters, weight_bytes

PAGE = Path(__file__).parent / "compare.md"
GB, KIB = 1e9, 1024
STORED = ("BF16", "Q8_0", "Q4_0")

HEAD = """# From LLaMA to Llama 3.3: what changed

All of them are one architecture: RMSNorm before each half of a layer, rotary positions, SwiGLU, no
biases. One file computes them all, [`models/llama.py`](../src/glassllama/models/llama.py); what
differs is configuration. This page is drawn from the table in
[`weights/presets.py`](../src/glassllama/weights/presets.py) by `python docs/make_compare.py`.

## From generation to generation

**Bold** is what differs from the generation to its left. Of Llama 3.2 only the text models are
meant; 3.3 was published as a chat model only.
"""

READING = """
How to read it:

- **Tokenizer.** Llama 3 left SentencePiece's 32,000 pieces for 128,000 byte-level pieces and 256
  special tokens. The same English text takes fewer tokens: on Meta's sample a token carries 3.94
  characters instead of 3.17 (*The Llama 3 Herd of Models*, section 3.2). The price is in the
  embedding and output matrices, which are four times as tall: {share} of Llama 3 8B's parameters
  are in these two.
- **GQA.** With grouped queries several query heads share one key and value head. The cache of keys
  and values shrinks by that factor: LLaMA 65B and Llama 2 70B both have 80 layers of 64 heads, and
  the second needs an eighth of the first's cache (last table). Llama 2 has it in its 70B model only
  (and in a 34B model that its paper describes and Meta did not publish); since Llama 3 every model
  has 8 key/value heads.
- **Context, theta, scaling.** The slow rotations of RoPE tell far positions apart. LLaMA and
  Llama 2 turn with RoPE's original base of 10,000. Llama 3 slows the rotations with a base of
  500,000, to support longer contexts (*Herd of Models*, section 3.2). Llama 3.1 goes on to 131,072
  tokens by dividing the slow rotations by 8 and leaving the fast ones alone, and by training on
  longer and longer texts (section 3.4.2); the small models of 3.2 divide by 32. A reader that
  ignores the scaling is right on short prompts and goes wrong on long ones, without any sign. The
  rule is `Llama3Scaling` in [`base/config.py`](../src/glassllama/base/config.py).
- **Tying.** The 1B and 3B models use one matrix as embedding and output: at 128,256 tokens a second
  one would add {untied} of their size.
- **What did not change:** from Llama 3 to 3.1 to 3.3 the 70B model has the same sizes. What is new
  between them, apart from the scaling, is in the numbers of the weights, not in the code.
"""

SIZES_HEAD = """
## Every model

C is the width of the residual stream, H query heads, K key/value heads, D the width of a head, F of
the feed-forward layer. Parameters are counted from the configuration.

"""

MEMORY_HEAD = """
## What it takes to run them

The cache is that of one conversation in 16 bits: 2 · layers · K · D · 2 bytes for every token.
Weights are in GB (10⁹ bytes): all matrices in the format named, norms in float32 beside blocks
(Q8_0: 34 bytes for 32 numbers, Q4_0: 18). Real GGUF files often keep a matrix or two in a richer
format and are a little larger.

"""

MEMORY_READING = """
Llama 3 8B has more parameters than LLaMA 7B and needs a quarter of its cache per token. At a full
context of 131,072 tokens the cache of Llama 3.1 8B is larger than its bfloat16 weights: the memory
of a long conversation is a question of K and of the context, not of parameters. Whether a model
fits *this* machine, and how to run it where it does not, says
[`weights/memory.py`](../src/glassllama/weights/memory.py).
"""

SOURCES_HEAD = """
## Sources

Sizes, context and heads are those of the papers and model cards below. The epsilon of the norms and
the scaling's factors stand in the configuration files that were published with the weights, the
base of 10,000 in Meta's code for the first two generations. Tests compare the table of Llama 3 and
later with Meta's own list of models (the `llama-models` package), and all parameter counts with
transformers' models of these shapes.

"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "--:") -> str:
    """A Markdown table; the first column is left-aligned."""
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def kv_heads(generation: Generation) -> str:
    """Which of its models group their queries, and how."""
    configs = {size: generation.config(size) for size in generation.models}
    grouped = [size for size, config in configs.items() if config.group_size > 1]
    if not grouped:
        return "no"
    heads = {configs[size].n_kv_heads for size in grouped}
    which = "all" if len(grouped) == len(configs) else ", ".join(grouped)
    return f"{which}: K = {', '.join(map(str, sorted(heads)))}"


def scaling(generation: Generation) -> str:
    rule = generation.rope_scaling
    return f"slow rotations ÷ {rule.factor:g}" if isinstance(rule, Llama3Scaling) else "none"


def epsilons(generation: Generation) -> str:
    found = {sizes.norm_eps for sizes in generation.models.values()}
    return ", ".join(f"{eps:g}" for eps in sorted(found))


PROPERTIES: dict[str, Callable[[Generation], str]] = {
    "released": lambda g: g.released,
    "sizes": lambda g: ", ".join(g.models),
    "tokenizer": lambda g: g.tokenizer,
    "vocabulary": lambda g: f"{g.vocab_size:,}",
    "context (tokens)": lambda g: f"{g.context:,}",
    "grouped queries": kv_heads,
    "RoPE theta": lambda g: f"{g.rope_theta:,.0f}",
    "RoPE scaling": scaling,
    "embeddings tied to output": lambda g: "yes" if g.tie_embeddings else "no",
    "epsilon of the norms": epsilons,
}


def generations() -> str:
    """One column a generation; what is new in it is bold."""
    rows = []
    for name, value in PROPERTIES.items():
        cells = [value(generation) for generation in GENERATIONS]
        changed = [f"**{new}**" if new != old else new for old, new in pairwise(cells)]
        rows.append([name, cells[0], *(cells[1:] if name == "released" else changed)])
    return table(["", *(generation.name for generation in GENERATIONS)], rows, align="---")


def models() -> list[tuple[str, LlamaConfig]]:
    return [(f"{g.name} {size}", g.config(size)) for g in GENERATIONS for size in g.models]


def sizes() -> str:
    rows = []
    for name, c in models():
        shape = (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.ffn_dim, parameters(c))
        rows.append([name, *(f"{n:,}" for n in shape)])
    return table(["model", "C", "layers", "H", "K", "D", "F", "parameters"], rows)


def memory() -> str:
    rows = []
    for name, c in models():
        cache = [f"{kv_bytes(c, 2) / KIB:,.0f} KiB", f"{c.max_seq_len * kv_bytes(c, 2) / GB:.1f}"]
        weights = [f"{weight_bytes(c, kind) / GB:.1f}" for kind in STORED]
        rows.append([name, *cache, *weights])
    weights_in = [f"weights in {kind}" for kind in STORED]
    return table(["model", "cache per token", "cache, full context (GB)", *weights_in], rows)


def reading() -> str:
    by_name = dict(models())
    eight, one, three = (by_name[f"Llama {n}"] for n in ("3 8B", "3.2 1B", "3.2 3B"))
    both = 2 * eight.vocab_size * eight.dim / parameters(eight)
    untied = [c.vocab_size * c.dim / parameters(c) for c in (one, three)]
    return READING.format(share=f"{both:.0%}", untied=f"{untied[0]:.0%} and {untied[1]:.0%}")


def page() -> str:
    sources = "\n".join(f"- {g.name}: {g.source}." for g in GENERATIONS)
    parts = [HEAD, "\n", generations(), reading(), SIZES_HEAD, sizes(), MEMORY_HEAD, memory()]
    return "".join([*parts, MEMORY_READING, SOURCES_HEAD, sources, "\n"])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
