"""Write docs/compare.md: what changed from LLaMA to Llama 3.3, and how other families differ.

The first part is from docs/llama_generations.py, the second from docs/families.py and the
descriptions of architectures.

python docs/make_compare.py          (a test fails while the page is stale)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from families import MODELS as FAMILIES
from glassllama.base.config import GivenDivisors, Llama3Scaling, LlamaConfig, RopeScaling
from glassllama.base.layer_plan import ModelPlan, llama_plan
from glassllama.weights.architectures import ARCHITECTURES, architecture_of, config_from_hf
from glassllama.weights.architectures.description import Architecture, Stored
from glassllama.weights.inspection import decisions
from llama_generations import GENERATIONS, Generation, parameters, weight_bytes

PAGE = Path(__file__).parent / "compare.md"
GB, KIB = 1e9, 1024
STORED = ("BF16", "Q8_0", "Q4_0")

HEAD = """# Llama and its relatives compared

[How other families differ](#how-other-families-differ) from Llama is in the second part.

## From LLaMA to Llama 3.3: what changed

All of them have the same architecture: RMSNorm before attention and before the feed-forward
network, rotary positions, SwiGLU, no biases. One file computes them all,
[`models/llama.py`](../src/glassllama/models/llama.py); only their configurations differ. This page
is written by `python docs/make_compare.py` from the table in
[`llama_generations.py`](llama_generations.py).

**Bold**: different from the generation to its left. Llama 3.2 stands for its text models; 3.3 was
published as a chat model only.
"""

READING = """
Notes:

- **Tokenizer.** Llama 3 replaced the 32,000 pieces of SentencePiece by 128,000 byte-level tokens
  and 256 special tokens. The same English text needs fewer tokens: on Meta's sample a token has
  3.94 characters instead of 3.17 (*The Llama 3 Herd of Models*, section 3.2). In return the
  embedding and output matrices have four times as many rows: they contain {share} of the parameters
  of Llama 3 8B.
- **GQA.** With grouped queries several query heads share one key/value head. The KV cache becomes
  smaller by that factor: LLaMA 65B and Llama 2 70B both have 80 layers of 64 heads, and the second
  needs an eighth of the cache (last table). In Llama 2 only the 70B model has it (and a 34B model
  that the paper describes and Meta did not publish). Since Llama 3 every model has 8 key/value
  heads.
- **Context, theta, scaling.** Slow rotations of RoPE distinguish positions that are far apart.
  LLaMA and Llama 2 use the original base of 10,000. Llama 3 makes the rotations slower with a base
  of 500,000, for longer contexts (*Herd of Models*, section 3.2). Llama 3.1 extends the context to
  131,072 tokens: it divides the slow rotations by 8, leaves the fast ones unchanged, and was
  trained on longer and longer texts (section 3.4.2). The small models of 3.2 divide by 32. A
  program that ignores the scaling is right on short prompts and wrong on long ones, without any
  error. The rule is `Llama3Scaling` in [`base/config.py`](../src/glassllama/base/config.py).
- **Tying.** The 1B and 3B models use one matrix as embedding and output: with 128,256 tokens a
  second one would add {untied} of their size.
- **What did not change.** The 70B model has the same sizes in Llama 3, 3.1 and 3.3. Apart from the
  scaling, only the weights are new.
"""

SIZES_HEAD = """
### Every model

C: width of the residual stream; H: query heads; K: key/value heads; D: width of a head; F: width of
the feed-forward network. Parameters are counted from the configuration.

"""

MEMORY_HEAD = """
### Memory

The KV cache is that of one conversation in 16 bits: 2 · layers · K · D · 2 bytes per token. Weights
are in GB (10⁹ bytes), with all matrices in the named format; beside block types norms are float32
(Q8_0: 34 bytes for 32 numbers, Q4_0: 18). Real GGUF files often store one or two matrices with more
bits and are a little larger.

"""

MEMORY_READING = """
Llama 3 8B has more parameters than LLaMA 7B and needs a quarter of its cache per token. With a full
context of 131,072 tokens the cache of Llama 3.1 8B is larger than its bfloat16 weights: the memory
of a long conversation depends on K and the context, not on the number of parameters.
`glassllama show MODEL` prints whether a model fits into the memory of this machine.
"""

FAMILIES_HEAD = """
## How other families differ

A column is a published model, a row a design decision. **Bold**: different from Llama. The second
table has the sizes. Both are made from the config.json of these models
([`families.py`](families.py)) and from the layer plans that the engine runs. Other models of a
family have other sizes, and some another window, scaling of RoPE or output matrix; Phi-4-mini
rotates three quarters of each head.

"""

FAMILIES_READING = """
- **norms**: *before* normalizes the input of a sublayer, *after* its output before it is added to
  the residual stream.
- **norm of q and k**: an RMSNorm with learned weights, before RoPE.
- **positions**: RoPE with its base. SmolLM3 has layers without it, Gemma 3 has two bases. Besides
  the rule of Llama 3.1 files of most families may ask for another one: {scalings}.
- **window**: a query sees so many tokens, its own included, instead of all before it.
- **soft caps**: cap · tanh(x / cap).
- **multipliers**: of the embeddings before the first layer, of what a sublayer adds to the residual
  stream, of the logits.
- **norms in files**: Hugging Face's files of Gemma have w for 1 + w.
- **stored as one matrix**: Hugging Face's files of Phi-3 have q, k and v in one matrix, gate and up
  in another.

`glassllama show MODEL` prints the decisions of any checkpoint, and the steps of `glassllama
walkthrough` show what they do. GPT-2 has no column: it has learned positions, LayerNorm and no gate
([`models/gpt.py`](../src/glassllama/models/gpt.py)).

### Where each family is

GGUF files of Mistral have the name `llama`.

"""

SOURCES_HEAD = """
### Sources

Sizes, contexts and heads are from the papers and model cards below. The epsilon of the norms and
the factors of the scaling are from the configuration files that were published with the weights,
the base of 10,000 from Meta's code of the first two generations. Tests compare the table of Llama 3
and later with Meta's own list of models (the `llama-models` package), and all parameter counts with
models of these shapes in transformers.

"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "--:") -> str:
    """A Markdown table; the first column is left-aligned."""
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def kv_heads(generation: Generation) -> str:
    """Which of its models have grouped queries, and their key/value heads."""
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
    """The first table: one column for each generation, changes in bold."""
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
        token = llama_plan(c).kv_bytes(2)
        cache = [f"{token / KIB:,.0f} KiB", f"{c.max_seq_len * token / GB:.1f}"]
        weights = [f"{weight_bytes(c, dtype) / GB:.1f}" for dtype in STORED]
        rows.append([name, *cache, *weights])
    weights_in = [f"weights in {dtype}" for dtype in STORED]
    return table(["model", "cache per token", "cache, full context (GB)", *weights_in], rows)


def reading() -> str:
    by_name = dict(models())
    eight, one, three = (by_name[f"Llama {n}"] for n in ("3 8B", "3.2 1B", "3.2 3B"))
    both = 2 * eight.vocab_size * eight.dim / parameters(eight)
    untied = [c.vocab_size * c.dim / parameters(c) for c in (one, three)]
    return READING.format(share=f"{both:.0%}", untied=f"{untied[0]:.0%} and {untied[1]:.0%}")


def resolved() -> dict[str, tuple[Architecture, Any, ModelPlan]]:
    """The models of other families: name -> description, configuration, layer plan."""
    found = {}
    for name, values in FAMILIES.items():
        config = config_from_hf(values).config
        architecture = architecture_of(config)
        assert architecture.layer_plan is not None
        found[name] = architecture, config, architecture.layer_plan(config)
    return found


def family_sizes(architecture: Architecture, config: Any) -> dict[str, str]:
    c, count = config, sum(math.prod(shape) for shape in architecture.shapes(config).values())
    return {
        "parameters": f"{count / GB:.2f} B",
        "width, layers": f"{c.dim:,}, {c.n_layers}",
        "query heads, KV heads": f"{c.n_heads}, {c.n_kv_heads}",
        "head width": f"{c.head_dim}" + (" = C / H" if c.head_dim * c.n_heads == c.dim else ""),
        "feed-forward width": f"{c.ffn_dim:,}",
        "vocabulary": f"{c.vocab_size:,}",
        "context (tokens)": f"{c.max_seq_len:,}",
    }


def family_decisions(architecture: Architecture, config: Any, plan: ModelPlan) -> dict[str, str]:
    """Design decisions of the plan, and how files store the tensors."""
    words, rule = decisions(plan), config.rope_scaling
    if rule is not None:
        scaled = f"RoPE, base {config.rope_theta:,.0f}, {type(rule).__name__}"
        words["positions"] = words["positions"].replace("RoPE, scaled", scaled)
    stored = [rule.hf for rule in architecture.rules if isinstance(rule.hf, Stored)]
    fused = dict.fromkeys(one.name.split(".")[-2] for one in stored if one.parts)
    return words | {
        "norms in files": "w for 1 + w" if any(one.less_one for one in stored) else "w",
        "stored as one matrix": ", ".join(fused) or "none",
    }


def families() -> str:
    """The second part: one column for each model, a row for each decision; then their sizes."""
    models, rows = resolved(), []
    columns = [family_decisions(*one) for one in models.values()]
    for name, llama in columns[0].items():
        cells = [column[name] for column in columns]
        rows.append([name, *(cell if cell == llama else f"**{cell}**" for cell in cells)])
    columns = [family_sizes(one, config) for one, config, _ in models.values()]
    sizes = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return "\n".join(table(["", *models], part, align="---") for part in (rows, sizes))


def family_files() -> str:
    """Model file, description and foreign names of every family."""
    rows = []
    for one in ARCHITECTURES.values():
        model = one.model.partition(":")[0].replace(".", "/")
        links = [
            f"[`{path.name}`](../src/{path})"
            for path in map(
                Path, (f"{model}.py", f"{one.config_from_hf.__module__.replace('.', '/')}.py")
            )
        ]
        hf = ", ".join(f"`{name}`" for name in one.hf_classes) or "none"
        rows.append([one.title, *links, hf, ", ".join(f"`{n}`" for n in one.gguf_names) or "none"])
    head = ["family", "model", "description", "model_type", "GGUF"]
    return table(head, rows, align="---")


def scalings() -> str:
    """The other rules of RoPE scaling, by the names of their classes."""
    rules = [rule for rule in get_args(RopeScaling) if rule not in (GivenDivisors, Llama3Scaling)]
    return ", ".join(f"`{rule.__name__}`" for rule in rules)


def page() -> str:
    sources = "\n".join(f"- {g.name}: {g.source}." for g in GENERATIONS)
    parts = [HEAD, "\n", generations(), reading(), SIZES_HEAD, sizes(), MEMORY_HEAD, memory()]
    parts += [MEMORY_READING, SOURCES_HEAD, sources, "\n", FAMILIES_HEAD, families()]
    return "".join([*parts, FAMILIES_READING.format(scalings=scalings()), family_files()])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
