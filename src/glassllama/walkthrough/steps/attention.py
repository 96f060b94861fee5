"""Steps 8 to 10: turned by position, compared, summed, and back into the residual stream."""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor

from glassllama.models.llama import Block
from glassllama.nn.attention import Attention, attention_scores, attention_weights, weighted_sum
from glassllama.nn.norm import rms_norm
from glassllama.nn.rope import ROTATE, rope_angles, rotate_complex
from glassllama.walkthrough.analysis import attention_entropy
from glassllama.walkthrough.pictures import Bars, Drawing, HeatMap, Table
from glassllama.walkthrough.step import Numbers, Step, WhatIf, source
from glassllama.walkthrough.walk import Walk, shape

ARROWS = "→↗↑↖←↙↓↘"  # anticlockwise from the right, as angles are counted
MOST_PAIRS = 12  # columns of the picture of angles


def rope(walk: Walk) -> Step:
    c, hand = walk.config, walk.by_hand
    complex_q = rotate_complex(hand.q, walk.angles, c.rope_layout)
    complex_q = rms_norm(complex_q, c.norm_eps) if c.qk_norm else complex_q
    scaled = "" if c.rope_scaling is None else ", stretched by the configuration's scaling"
    normed = " Then the whole head is brought to one length (qk_norm)." if c.qk_norm else ""
    q, q_rope = (f"{walk.prefix}.attention.{name}" for name in ("q", "q_rope"))
    return Step(
        number=8,
        name="rope",
        title="RoPE: position as rotation",
        question="How does a head know where a token stands?",
        shapes=f"q {shape(hand.q)}, angles {shape(walk.angles)} → q_rope {shape(hand.q_rope)}",
        sources=(
            source(rope_angles, "return"),
            source(ROTATE[c.rope_layout], "a, b =", "turned =", "return"),
        ),
        text=(
            f"{one_pair(walk)}{normed} Later pairs turn more slowly (theta {c.rope_theta:,.0f}"
            f"{scaled}). Only the difference of two positions is left when q meets k.",
        ),
        numbers=(
            Numbers("angles, last token", walk.angles[0, -1]),
            Numbers("q before", hand.q[0, walk.head, -1], q),
            Numbers("q after", hand.q_rope[0, walk.head, -1], q_rope),
        ),
        pictures=(Drawing(layout_drawing(c.head_dim, c.rope_layout)), arrows(walk)),
        checks=(
            *walk.checks("q_rope", "k_rope"),
            walk.compare("q_rope by complex numbers", complex_q, walk.trace[q_rope]),
        ),
        what_if=WhatIf(
            command=walk.command("--rope-layout wrong"),
            shows="the other layout: no shape is wrong, nothing warns, and short texts look right",
        ),
        data={"layout": c.rope_layout, "frequencies": walk.model.frequencies.tolist()},
    )


def one_pair(walk: Walk) -> str:
    """The first pair of the last token's query, turned as a complex number."""
    c, position = walk.config, len(walk.ids) - 1
    pair = (0, 1) if c.rope_layout == "interleaved" else (0, c.head_dim // 2)
    a, b = (float(walk.by_hand.q[0, walk.head, -1, n]) for n in pair)
    frequency, angle = float(walk.model.frequencies[0]), float(walk.angles[0, -1, 0])
    turned = complex(a, b) * cmath.rect(1, angle)
    return (
        f"Two coordinates are a number a + bi, and position {position} turns the first pair by "
        f"{position} × {frequency:.4g} = {angle:.4f} radians: ({a:.4f} {b:+.4f}i) · "
        f"e^({angle:.4f}i) = {turned.real:.4f} {turned.imag:+.4f}i."
    )


def layout_drawing(head_dim: int, layout: str) -> tuple[str, ...]:
    half = head_dim // 2
    first = range(min(4, half))
    mark = {layout: "  ← this checkpoint"}
    pairs = "  ".join(f"{2 * n}─{2 * n + 1}" for n in first)
    halves = "  ".join(f"{n}─{n + half}" for n in first)
    more = "  …  " if half > len(first) else "  "
    return (
        f"interleaved  {pairs}{more}{head_dim - 2}─{head_dim - 1}{mark.get('interleaved', '')}",
        f"half         {halves}{more}{half - 1}─{head_dim - 1}{mark.get('half', '')}",
    )


def arrows(walk: Walk) -> Table:
    """Where the hand of each pair points at each position; 0 radians is to the right."""
    half = walk.config.head_dim // 2
    step = -(-half // MOST_PAIRS)
    chosen = range(0, half, step)
    rows = [
        (n, walk.pieces[n], *(arrow(float(walk.angles[0, n, pair])) for pair in chosen))
        for n in walk.shown
    ]
    return Table(
        ["position>", "token", *(f"{pair}>" for pair in chosen)],
        rows,
        title="where the hand of each pair of coordinates points (0 is to the right)",
    )


def arrow(angle: float) -> str:
    return ARROWS[round(angle / (2 * math.pi) * len(ARROWS)) % len(ARROWS)]


def scores_and_weights(walk: Walk) -> Step:
    hand, h, prefix = walk.by_hand, walk.head, f"{walk.prefix}.attention"
    weights, entropy = hand.weights[0, h], attention_entropy(hand.weights)[0]  # (T, S), (H, T)
    most = weights[-1].topk(min(3, len(walk.ids)))
    seen = ", ".join(f"{walk.pieces[int(n)]} {float(w):.0%}" for w, n in zip(*most, strict=True))
    title = f"layer {walk.layer}, head {h}: who (down) listens to whom (across)"
    return Step(
        number=9,
        name="attention",
        title="Scores, mask, softmax",
        question="Whom does each token listen to?",
        shapes=f"q_rope {shape(hand.q_rope)}, k_rope {shape(hand.k_rope)} → {shape(hand.weights)}",
        sources=(
            source(attention_scores, "return"),
            source(attention_weights, "hidden =", "return"),
        ),
        text=(
            "Each query meets each key; what lies in the future becomes -∞ and so weight 0; the "
            f"rest is made to sum to one. Head {h}, last token: {seen}. It spreads over "
            f"{float(entropy[h, -1]):.2f} bits (0: one token only, {math.log2(len(walk.ids)):.2f}: "
            "all alike).",
        ),
        numbers=(
            Numbers("scores, last token", hand.scores[0, h, -1], f"{prefix}.scores"),
            Numbers("weights, last token", weights[-1], f"{prefix}.weights"),
        ),
        pictures=(HeatMap(title, weights.float().numpy(), walk.pieces, top=1.0, triangle=True),),
        checks=walk.checks("scores", "weights"),
        what_if=WhatIf(
            command=walk.command("--no-mask"),
            shows="without the mask every token sees the ones after it",
        ),
        data={"entropy_bits": entropy.tolist()},
    )


def head_shares(walk: Walk) -> Tensor:
    """What each head adds to the residual stream, through its columns of wo: (H, T, C)."""
    c = walk.config
    wo = walk.layer_weight(walk.layer, "attention.wo").float()
    columns = wo.reshape(c.dim, c.n_heads, c.head_dim)
    return torch.einsum("chd,htd->htc", columns, walk.by_hand.heads[0].float())


def into_the_residual(walk: Walk) -> Step:
    hand, shares = walk.by_hand, head_shares(walk)
    lengths = shares[:, -1].norm(dim=-1).tolist()
    before = float(walk.residual_before[0, -1].float().norm())
    after = float(hand.after_attention[0, -1].float().norm())
    numbers = (
        Numbers(
            f"head {walk.head}", hand.heads[0, walk.head, -1], f"{walk.prefix}.attention.heads"
        ),
        Numbers("wo's output", hand.wo[0, -1], f"{walk.prefix}.attention.wo"),
        Numbers("x + output", hand.after_attention[0, -1], f"{walk.prefix}.after_attention"),
    )
    return Step(
        number=10,
        name="residual",
        title="Weighted sum, wo, residual",
        question="What do the heads bring home, and where does it go?",
        shapes=f"weights {shape(hand.weights)}, v {shape(hand.v)} → {shape(hand.after_attention)}",
        sources=(
            source(weighted_sum, "v =", "return"),
            source(Attention.forward, "return"),
            source(Block.forward, "x = self.after_attention"),
        ),
        text=(
            "Each head takes the values of those it listens to, in proportion. wo turns the heads, "
            "side by side, into one vector, which is added: the residual stream of the last token "
            f"goes from length {before:.3f} to {after:.3f}.",
        ),
        numbers=numbers,
        pictures=(share_bars(lengths),),
        checks=(
            *walk.checks("heads", "wo", "after_attention"),
            walk.compare("the heads' shares, added", shares.sum(0)[None].to(hand.wo), hand.wo),
        ),
        what_if=WhatIf(
            command=walk.command("--scale wrong"),
            shows="scores not divided by √D: heads listen to one token each",
        ),
        data={"head_shares": lengths},
    )


def share_bars(lengths: list[float]) -> Bars:
    return Bars(
        "how much each head adds to the last token (length of its share through wo)",
        [f"head {h}" for h in range(len(lengths))],
        lengths,
        [f"{length:.3f}" for length in lengths],
    )
