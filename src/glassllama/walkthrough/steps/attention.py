"""Steps 5 to 10: norm, queries, keys and values, heads, positions, attention weights, output."""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor

from glassllama.nn.attention import (
    attention_scores,
    attention_weights,
    split_heads,
    weighted_sum,
)
from glassllama.nn.norm import RMSNorm, rms_norm
from glassllama.nn.rope import ROTATE, rope_angles, rotate_complex
from glassllama.walkthrough.analysis import attention_entropy
from glassllama.walkthrough.manual_block import layer_norm
from glassllama.walkthrough.pictures import Bars, Drawing, HeatMap, Table
from glassllama.walkthrough.step import Numbers, Source, Step, source
from glassllama.walkthrough.steps.input import embedding_rows
from glassllama.walkthrough.walkthrough import Walkthrough, shape

DRAWING_WIDTH = 72
ARROWS = "→↗↑↖←↙↓↘"  # counterclockwise from the right, as angles are measured
SHOWN_PAIRS = 12  # columns of the table of angles


def norm(walk: Walkthrough) -> Step:
    """The last token's vector, normalized in Python floats."""
    x, eps = walk.block_input[0, -1].float().tolist(), walk.config.norm_eps
    weight, out = walk.block_parameter("attention_norm.weight"), walk.manual["attention_norm"]
    root_mean_square = walk.is_rms_norm
    mean = 0.0 if root_mean_square else math.fsum(x) / len(x)
    mean_square = math.fsum((value - mean) ** 2 for value in x) / len(x)
    root = math.sqrt(mean_square + eps)
    divided = torch.tensor([(value - mean) / root for value in x])
    numbers = [Numbers("x", walk.block_input[0, -1]), Numbers("weight", weight)]
    manual = divided.to(weight) * weight if root_mean_square else divided * weight.float()
    if root_mean_square:
        text = f"the mean of its {len(x)} squares is {mean_square:.6g}; with eps {eps:g} the root "
        text += f"is {root:.6g}. Every number is divided by it"
    else:
        text = f"the mean of its {len(x)} numbers is {mean:.6g} and their variance "
        text += f"{mean_square:.6g}; with eps {eps:g} the standard deviation is {root:.6g}. The "
        text += "mean is subtracted from every number, which is divided by the standard deviation"
        if walk.config.bias:
            bias = walk.block_parameter("attention_norm.bias")
            numbers.append(Numbers("bias", bias))
            manual = manual + bias.float()
    numbers[1:1] = [Numbers("divided", divided)]
    numbers.append(Numbers("result", out[0, -1], f"{walk.prefix}.attention_norm"))
    return Step(
        name="norm",
        title="RMSNorm" if root_mean_square else "LayerNorm",
        question="How is the input of a layer normalized?",
        shapes=f"x {shape(walk.block_input)} → attention_norm {shape(out)}",
        sources=norm_sources(walk),
        text=(
            f"For the last token, {walk.pieces[-1]}: {text}, then multiplied by a learned weight "
            "per channel. The residual stream itself stays as it is.",
        ),
        numbers=tuple(numbers),
        checks=(
            *walk.checks("attention_norm"),
            walk.compare("the last token, in Python floats", manual.to(out), out[0, -1]),
        ),
        command=walk.command(f"--step 5 --layer {walk.config.n_layers - 1}"),
        command_shows="the root is much larger in the last layer: the residual stream grows",
        data={"mean": mean, "mean_square": mean_square, "root": root, "eps": eps},
    )


def norm_sources(walk: Walkthrough) -> tuple[Source, ...]:
    if walk.is_rms_norm:
        return source(rms_norm, "wide =", "return"), source(RMSNorm.forward, "return")
    return (source(layer_norm),)


def queries_keys_values(walk: Walkthrough) -> Step:
    t, h, g = walk.manual, walk.head, walk.kv_head
    q, k, v = (t[f"attention.{name}"] for name in "qkv")
    attention = walk.implementation(f"{walk.prefix}.attention")
    return Step(
        name="qkv",
        title="Queries, keys and values",
        question="Which vectors does attention compare, and which does it add up?",
        shapes=f"{shape(t['attention_norm'])} → q {shape(q)}, k {shape(k)}, v {shape(v)}",
        sources=(source(attention.forward, "q = self.q(", "k = self.k(", "v = self.v("),),
        text=(
            "Three matrices, each read from the file. Queries are compared with keys to compute "
            "attention weights; values are what is added up with these weights. Each result is "
            f"split into heads of {walk.config.head_dim} numbers.",
        ),
        numbers=(
            Numbers(f"q, head {h}, last token", q[0, h, -1], f"{walk.prefix}.attention.q"),
            Numbers(f"k, KV head {g}, last token", k[0, g, -1], f"{walk.prefix}.attention.k"),
            Numbers(f"v, KV head {g}, last token", v[0, g, -1], f"{walk.prefix}.attention.v"),
        ),
        pictures=(
            HeatMap(
                f"q of head {h}: one row per token",
                q[0, h, walk.shown.start :].float().numpy(),
                [walk.pieces[n] for n in walk.shown],
            ),
        ),
        checks=walk.checks("attention.q", "attention.k", "attention.v"),
        command=walk.command(f"--step 6 --head {walk.config.n_heads - 1}"),
        command_shows="the query of another head of the same layer",
    )


def rotated(walk: Walkthrough) -> tuple[Tensor, Tensor]:
    """Queries and keys as the scores are computed from them."""
    t, name = walk.manual, "_rope" if walk.has_rope else ""
    return t[f"attention.q{name}"], t[f"attention.k{name}"]


def heads_and_groups(walk: Walkthrough) -> Step:
    c, n_kv_heads, size = walk.config, walk.n_kv_heads, walk.group_size
    q, k = rotated(walk)
    per_head = [q[:, h].float() @ k[:, h // size].float().mT for h in range(c.n_heads)]
    scores = torch.stack(per_head, dim=1) / math.sqrt(c.head_dim)  # (B, H, T, S)
    per_token = 2 * c.n_layers * c.head_dim * walk.dtype.itemsize
    cache = f"keys and values are cached: {per_token * n_kv_heads:,} bytes per token in all layers"
    if size > 1:
        question = "Why are there fewer KV heads than query heads?"
        text = f"Grouped-query attention: {c.n_heads} query heads share {n_kv_heads} KV heads, "
        text += f"{size} each; query head h uses KV head h // {size}. Only {cache}, instead of "
        text += f"{per_token * c.n_heads:,} with one KV head for each query head."
    else:
        question = "How is attention divided into heads?"
        text = f"Each of the {c.n_heads} query heads has a KV head of its own (multi-head "
        text += f"attention, no groups). Only {cache}."
    return Step(
        name="groups",
        title="Heads and groups" if size > 1 else "Heads",
        question=question,
        shapes=f"k {shape(k)} → for {c.n_heads} query heads {shape(q)}",
        sources=(
            source(split_heads, "return"),
            source(attention_scores, "k = k.repeat_interleave"),
        ),
        text=(text,),
        pictures=(Drawing(group_drawing(c.n_heads, n_kv_heads, walk.head)),),
        checks=(walk.check(f"{walk.prefix}.attention.scores", scores),),
        command=walk.command(f"--step 9 --head {walk.kv_head * size}"),
        command_shows=f"attention weights of the first query head that uses KV head {walk.kv_head}",
        data={"n_heads": c.n_heads, "n_kv_heads": n_kv_heads, "group_size": size,
              "kv_head_of": [h // size for h in range(c.n_heads)]},
    )  # fmt: skip


def group_drawing(n_heads: int, n_kv_heads: int, chosen: int) -> tuple[str, ...]:
    """Query heads above, the KV head of each group below; the chosen head in brackets."""
    size = n_heads // n_kv_heads
    cells = [f"[{h}]" if h == chosen else f" {h} " for h in range(n_heads)]
    width = max(map(len, cells))
    blocks = []
    for group in range(n_kv_heads):
        members = [c.center(width) for c in cells[group * size : (group + 1) * size]]
        top = "".join(members)
        ends = [width // 2 + n * width for n in range(size)]
        line = "".join(joint(n, ends) for n in range(len(top)))
        mark = f"[{group}]" if group == chosen // size else f"{group}"
        blocks.append((top, line, mark.center(len(top))))
    fit = max((DRAWING_WIDTH - 8) // (len(blocks[0][0]) + 1), 1)
    drawn: list[str] = []
    for start in range(0, len(blocks), fit):
        rows = zip(*blocks[start : start + fit], strict=True)
        for name, row in zip(("query", "", "KV"), rows, strict=True):
            drawn.append(f"{name:<7} {' '.join(row)}".rstrip())
    return tuple(drawn)


def joint(n: int, ends: list[int]) -> str:
    """One character of the line that connects a group."""
    if len(ends) == 1:
        return "│" if n == ends[0] else " "
    if n in ends:
        return "└" if n == ends[0] else "┘" if n == ends[-1] else "┴"
    return "─" if ends[0] < n < ends[-1] else " "


def positions(walk: Walkthrough) -> Step:
    return rope(walk, walk.angles) if walk.angles is not None else learned_positions(walk)


def rope(walk: Walkthrough, angles: Tensor) -> Step:
    c, t, attention = walk.config, walk.manual, f"{walk.prefix}.attention"
    complex_q = rotate_complex(t["attention.q"], angles, c.rope_layout)
    complex_q = rms_norm(complex_q, c.norm_eps) if c.qk_norm else complex_q
    scaled = "" if c.rope_scaling is None else ", changed by the configuration's rope_scaling"
    normed = " Then the whole head is divided by its RMS (qk_norm)." if c.qk_norm else ""
    q, q_rope = t["attention.q"], t["attention.q_rope"]
    return Step(
        name="rope",
        title="RoPE: positions as rotations",
        question="How do attention scores depend on the positions of tokens?",
        shapes=f"q {shape(q)}, angles {shape(angles)} → q_rope {shape(q_rope)}",
        sources=(
            source(rope_angles, "return"),
            source(ROTATE[c.rope_layout], "a, b =", "turned =", "return"),
        ),
        text=(
            f"{one_pair(walk, angles)}{normed} Later pairs rotate more slowly (theta "
            f"{c.rope_theta:,.0f}{scaled}). The score of a query and a key depends on the "
            "difference of their positions only.",
        ),
        numbers=(
            Numbers("angles, last token", angles[0, -1]),
            Numbers("q before", q[0, walk.head, -1], f"{attention}.q"),
            Numbers("q after", q_rope[0, walk.head, -1], f"{attention}.q_rope"),
        ),
        pictures=(
            Drawing(layout_drawing(c.head_dim, c.rope_layout)),
            angle_table(walk, angles),
        ),
        checks=(
            *walk.checks("attention.q_rope", "attention.k_rope"),
            walk.compare("q_rope by complex numbers", complex_q, walk.trace[f"{attention}.q_rope"]),
        ),
        command=walk.command("--rope-layout wrong"),
        command_shows="the other layout: all shapes are right, and short prompts often look right",
        data={"layout": c.rope_layout, "frequencies": walk.frequencies.tolist()},
    )


def one_pair(walk: Walkthrough, angles: Tensor) -> str:
    """The first pair of the last token's query, rotated as a complex number."""
    position = len(walk.ids) - 1
    pair = (0, 1) if walk.config.rope_layout == "interleaved" else (0, walk.config.head_dim // 2)
    a, b = (float(walk.manual["attention.q"][0, walk.head, -1, n]) for n in pair)
    frequency, angle = float(walk.frequencies[0]), float(angles[0, -1, 0])
    rotated = complex(a, b) * cmath.rect(1, angle)
    return (
        f"Two coordinates are read as a complex number a + bi. Position {position} rotates the "
        f"first pair by {position} × {frequency:.4g} = {angle:.4f} radians: ({a:.4f} {b:+.4f}i) · "
        f"e^({angle:.4f}i) = {rotated.real:.4f} {rotated.imag:+.4f}i."
    )


def layout_drawing(head_dim: int, layout: str) -> tuple[str, ...]:
    """Which coordinates of a head form a pair, in both layouts."""
    half = head_dim // 2
    first = [*range(min(4, half))]
    more = "  …  " if half > len(first) else "  "
    drawn = []
    for name in ("interleaved", "half"):
        both = [(2 * n, 2 * n + 1) if name == "interleaved" else (n, n + half)
                for n in (*first, half - 1)]  # fmt: skip
        pairs = [f"{a}─{b}" for a, b in both]
        mark = "  ← this checkpoint" if name == layout else ""
        drawn.append(f"{name:<11}  {'  '.join(pairs[:-1])}{more}{pairs[-1]}{mark}")
    return tuple(drawn)


def angle_table(walk: Walkthrough, angles: Tensor) -> Table:
    """The direction of each pair at each position; 0 radians is to the right."""
    half = walk.config.head_dim // 2
    pairs = range(0, half, -(-half // SHOWN_PAIRS))
    rows = [
        (n, walk.pieces[n], *(arrow(float(angles[0, n, pair])) for pair in pairs))
        for n in walk.shown
    ]
    columns = ["position>", "token", *(f"{pair}>" for pair in pairs)]
    return Table(columns, rows, title="angle of each pair of coordinates (0 is to the right)")


def arrow(angle: float) -> str:
    return ARROWS[round(angle / (2 * math.pi) * len(ARROWS)) % len(ARROWS)]


def learned_positions(walk: Walkthrough) -> Step:
    """For models that add a learned vector per position to the embeddings instead of RoPE."""
    rows, vectors = embedding_rows(walk)
    assert vectors is not None
    directions = torch.nn.functional.normalize(vectors[0, walk.shown.start :].float(), dim=-1)
    last = len(walk.ids) - 1
    return Step(
        name="positions",
        title="Positions: one learned vector each",
        question="How do attention scores depend on the positions of tokens?",
        shapes=f"tokens {shape(rows)} + positions {shape(vectors)} → x {shape(rows)}",
        sources=(source(walk.implementation().hidden, "positions, mask =", "x = self.embeddings"),),
        text=(
            "This model has no RoPE: queries and keys are not rotated. Instead the row of "
            "pos_embeddings for each position is added to the embedding of its token before the "
            f"first layer. There are {walk.config.max_seq_len:,} rows, so no text can be longer.",
        ),
        numbers=(
            Numbers(f"token {walk.pieces[-1]}", rows[0, -1], "tok_embeddings"),
            Numbers(f"position {last}", vectors[0, -1], "pos_embeddings"),
            Numbers("sum", (rows + vectors)[0, -1], "embeddings"),
        ),
        pictures=(
            HeatMap(
                "cosine similarity of the vectors of positions",
                (directions @ directions.T).numpy(),
                [str(n) for n in walk.shown],
                top=1.0,
            ),
        ),
        checks=(
            walk.check("pos_embeddings", vectors),
            walk.check("embeddings", rows + vectors),
        ),
        command=walk.command("--step 8"),
        command_shows="a longer prompt: neighboring positions have similar vectors",
        data={"position_norms": vectors[0].float().norm(dim=-1).tolist()},
    )


def attention_weights_step(walk: Walkthrough) -> Step:
    t, h, prefix = walk.manual, walk.head, f"{walk.prefix}.attention"
    q, k = rotated(walk)
    weights, entropy = t["attention.weights"][0, h], attention_entropy(t["attention.weights"])[0]
    largest = weights[-1].topk(min(3, len(walk.ids)))
    top = ", ".join(f"{walk.pieces[int(n)]} {float(w):.0%}" for w, n in zip(*largest, strict=True))
    title = f"layer {walk.layer}, head {walk.head}: rows are queries, columns are keys"
    return Step(
        name="attention",
        title="Scores, mask, softmax",
        question="How much attention does each token pay to the tokens before it?",
        shapes=f"q {shape(q)}, k {shape(k)} → weights {shape(t['attention.weights'])}",
        sources=(
            source(attention_scores, "return"),
            source(attention_weights, "hidden =", "return"),
        ),
        text=(
            "The score of a query and a key is their product, divided by √D. The causal mask sets "
            "scores of later tokens to -∞, so that their weight is 0; softmax makes the weights of "
            f"each row sum to one. Head {h}, last token: {top}. Entropy "
            f"{float(entropy[h, -1]):.2f} bits (0: one token gets all attention; "
            f"{math.log2(len(walk.ids)):.2f}: all {len(walk.ids)} get the same).",
        ),
        numbers=(
            Numbers("scores, last token", t["attention.scores"][0, h, -1], f"{prefix}.scores"),
            Numbers("weights, last token", weights[-1], f"{prefix}.weights"),
        ),
        pictures=(HeatMap(title, weights.float().numpy(), walk.pieces, top=1.0, triangle=True),),
        checks=walk.checks("attention.scores", "attention.weights"),
        command=walk.command("--no-mask"),
        command_shows="without the mask every token also attends to the tokens after it",
        data={"entropy_bits": entropy.tolist()},
    )


def head_contributions(walk: Walkthrough) -> Tensor:
    """What each head adds to the residual stream through its columns of wo: (H, T, C)."""
    c = walk.config
    wo = walk.block_parameter("attention.wo.weight").float()
    columns = wo.reshape(c.dim, c.n_heads, c.head_dim)
    return torch.einsum("chd,htd->htc", columns, walk.manual["attention.heads"][0].float())


def attention_output(walk: Walkthrough) -> Step:
    t, prefix = walk.manual, walk.prefix
    parts = head_contributions(walk)
    total = parts.sum(0)[None]
    if f"{prefix}.attention.wo.bias" in walk.checkpoint.names:
        total = total + walk.block_parameter("attention.wo.bias").float()
    lengths = parts[:, -1].norm(dim=-1).tolist()
    before, after = (
        float(x[0, -1].float().norm()) for x in (walk.block_input, t["after_attention"])
    )
    heads, wo = t["attention.heads"], t["attention.wo"]
    return Step(
        name="residual",
        title="Weighted sum, wo, residual",
        question="What does attention add to the residual stream?",
        shapes=f"weights {shape(t['attention.weights'])}, v {shape(t['attention.v'])} → "
        f"{shape(t['after_attention'])}",
        sources=(
            source(weighted_sum, "v =", "return"),
            source(walk.implementation(f"{prefix}.attention").forward, "return"),
            source(walk.implementation(prefix).forward, "x = self.after_attention"),
        ),
        text=(
            "Each head adds up the values of the visible tokens, multiplied by its attention "
            "weights. The matrix wo maps the heads, joined to one vector, to the width of the "
            "model. The result is added to the residual stream, whose vector for the last token "
            f"changes its norm from {before:.3f} to {after:.3f}.",
        ),
        numbers=(
            Numbers(f"head {walk.head}", heads[0, walk.head, -1], f"{prefix}.attention.heads"),
            Numbers("output of wo", wo[0, -1], f"{prefix}.attention.wo"),
            Numbers("x + output", t["after_attention"][0, -1], f"{prefix}.after_attention"),
        ),
        pictures=(
            Bars(
                "what each head adds to the last token (L2 norm, after wo)",
                [f"head {h}" for h in range(len(lengths))],
                lengths,
                [f"{length:.3f}" for length in lengths],
            ),
        ),
        checks=(
            *walk.checks("attention.heads", "attention.wo", "after_attention"),
            walk.compare("contributions of all heads, added up", total.to(wo), wo),
        ),
        command=walk.command("--scale wrong"),
        command_shows="scores not divided by √D: nearly all weight is on one token",
        data={"head_contributions": lengths},
    )
