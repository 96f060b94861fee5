"""Steps 5 to 7: what enters a layer, and the questions, keys and values made of it."""

from __future__ import annotations

import math

import torch

from glassllama.nn.attention import Attention, attention_scores, split_heads
from glassllama.nn.norm import RMSNorm, rms_norm
from glassllama.walkthrough.pictures import Drawing, HeatMap
from glassllama.walkthrough.step import Numbers, Step, WhatIf, source
from glassllama.walkthrough.walk import Walk, shape

WIDEST_DRAWING = 72


def norm(walk: Walk) -> Step:
    x, eps = walk.residual_before[0, -1].float().tolist(), walk.config.norm_eps
    weight = walk.layer_weight(walk.layer, "attention_norm")
    mean_square = math.fsum(value * value for value in x) / len(x)
    root = math.sqrt(mean_square + eps)
    out = walk.by_hand.attention_norm
    by_hand = torch.tensor([value / root for value in x]).to(weight) * weight
    return Step(
        number=5,
        name="norm",
        title="RMSNorm by hand",
        question="How does a layer keep its numbers in a range that it knows?",
        shapes=f"x {shape(walk.residual_before)} → attention_norm {shape(out)}",
        sources=(source(rms_norm, "wide =", "return"), source(RMSNorm.forward, "return")),
        text=(
            f"For the last token, {walk.pieces[-1]}: the mean of its {len(x)} squares is "
            f"{mean_square:.6g}; with eps {eps:g} the root is {root:.6g}. Every number is divided "
            "by it, then multiplied by a learned weight of its channel.",
        ),
        numbers=(
            Numbers("x", walk.residual_before[0, -1]),
            Numbers("÷ root", torch.tensor(x) / root),
            Numbers("weight", weight),
            Numbers("× weight", out[0, -1], f"{walk.prefix}.attention_norm"),
        ),
        checks=(
            *walk.checks("attention_norm"),
            walk.compare("the last token in Python's own arithmetic", by_hand, out[0, -1]),
        ),
        what_if=WhatIf(
            command=walk.command(f"--step 5 --layer {walk.config.n_layers - 1}"),
            shows="in the last layer the root is far larger: the residual stream has grown",
        ),
        data={"mean_square": mean_square, "root": root, "eps": eps},
    )


def queries_keys_values(walk: Walk) -> Step:
    hand, h, prefix = walk.by_hand, walk.head, f"{walk.prefix}.attention"
    x = shape(hand.attention_norm)
    return Step(
        number=6,
        name="qkv",
        title="Queries, keys and values",
        question="What does a token ask, what does it answer to, and what does it hold?",
        shapes=f"{x} → q {shape(hand.q)}, k {shape(hand.k)}, v {shape(hand.v)}",
        sources=(source(Attention.forward, "q = self.q(", "k = self.k(", "v = self.v("),),
        text=(
            "Three matrices, each read from the file. q is what a token looks for, k what it can "
            "be found by, v what it gives to those who find it. The result is cut into heads of "
            f"{walk.config.head_dim} numbers.",
        ),
        numbers=(
            Numbers(f"q, head {h}, last token", hand.q[0, h, -1], f"{prefix}.q"),
            Numbers(
                f"k, head {walk.kv_head}, last token", hand.k[0, walk.kv_head, -1], f"{prefix}.k"
            ),
            Numbers(
                f"v, head {walk.kv_head}, last token", hand.v[0, walk.kv_head, -1], f"{prefix}.v"
            ),
        ),
        pictures=(
            HeatMap(
                f"q of head {h}: tokens down, its numbers across",
                hand.q[0, h, walk.shown.start :].float().numpy(),
                [walk.pieces[n] for n in walk.shown],
            ),
        ),
        checks=walk.checks("q", "k", "v"),
        what_if=WhatIf(
            command=walk.command(f"--step 6 --head {walk.config.n_heads - 1}"),
            shows="another head of the same layer asks for something else",
        ),
    )


def groups(walk: Walk) -> Step:
    c, hand = walk.config, walk.by_hand
    scores = torch.stack(
        [
            hand.q_rope[:, h].float() @ hand.k_rope[:, h // c.group_size].float().mT
            for h in range(c.n_heads)
        ],
        dim=1,
    ) / math.sqrt(c.head_dim)  # (B, H, T, S)
    per_token = 2 * c.n_layers * c.head_dim * walk.model.tok_embeddings.weight.itemsize
    return Step(
        number=7,
        name="groups",
        title="Heads and groups",
        question="Why are there fewer heads of keys than of queries?",
        shapes=f"k {shape(hand.k)} → as seen by {c.n_heads} query heads {shape(hand.q)}",
        sources=(
            source(split_heads, "return"),
            source(attention_scores, "k = k.repeat_interleave"),
        ),
        text=(
            f"{c.n_heads} query heads share {c.n_kv_heads} heads of keys and values, "
            f"{c.group_size} each: query head h asks kv head h // {c.group_size}. Only keys and "
            f"values are kept for later tokens: {per_token * c.n_kv_heads:,} bytes a token in all "
            f"layers, instead of {per_token * c.n_heads:,}.",
        ),
        pictures=(Drawing(group_drawing(c.n_heads, c.n_kv_heads, walk.head)),),
        checks=(walk.check(f"{walk.prefix}.attention.scores", scores),),
        what_if=WhatIf(
            command=walk.command(f"--step 9 --head {walk.kv_head * c.group_size}"),
            shows=f"the first head of group {walk.kv_head}: same keys, other questions",
        ),
        data={"n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "group_size": c.group_size,
              "kv_head_of": [h // c.group_size for h in range(c.n_heads)]},
    )  # fmt: skip


def group_drawing(n_heads: int, n_kv_heads: int, chosen: int) -> tuple[str, ...]:
    """Query heads above, the kv head that a group shares below; the chosen head in brackets."""
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
    fit = max((WIDEST_DRAWING - 8) // (len(blocks[0][0]) + 1), 1)
    drawn: list[str] = []
    for start in range(0, len(blocks), fit):
        part = blocks[start : start + fit]
        for name, row in zip(("query", "", "kv"), zip(*part, strict=True), strict=True):
            drawn.append(f"{name:<7} {' '.join(row)}".rstrip())
    return tuple(drawn)


def joint(n: int, ends: list[int]) -> str:
    """One character of the line that joins a group."""
    if len(ends) == 1:
        return "│" if n == ends[0] else " "
    if n in ends:
        return "└" if n == ends[0] else "┘" if n == ends[-1] else "┴"
    return "─" if ends[0] < n < ends[-1] else " "
