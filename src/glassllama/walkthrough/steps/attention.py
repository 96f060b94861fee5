"""Steps 5 to 10: norm, queries, keys and values, heads, positions, attention weights, output."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glassllama.base.layer_plan import AttentionPlan, RopePlan, usual_scale
from glassllama.nn.attention import (
    attention_scores,
    attention_weights,
    soft_cap,
    split_heads,
    weighted_sum,
    window_mask,
)
from glassllama.nn.norm import RMSNorm, rms_norm
from glassllama.nn.rope import ROTATE, rope_angles, rotate_complex, rotate_part
from glassllama.walkthrough.manual_block import layer_norm, visible_mask
from glassllama.walkthrough.step import Bars, Drawing, HeatMap, Numbers, Step, Table, sources
from glassllama.walkthrough.steps.input import embedding_numbers, embedding_rows
from glassllama.walkthrough.tracing import attention_entropy
from glassllama.walkthrough.walkthrough import Walkthrough, shape

DRAWING_WIDTH = 72
ARROWS = "→↗↑↖←↙↓↘"  # counterclockwise from the right, as angles are measured
SHOWN_PAIRS = 12  # columns of the table of angles
# A norm -> the hook of its input; what it normalizes.
NORM_INPUTS = {
    "attention_norm": ("", "the input of a layer"),
    "post_attention_norm": ("attention.wo", "the output of attention"),
    "ffn_norm": ("after_attention", "the input of the feed-forward network"),
    "post_ffn_norm": ("feed_forward.down", "the output of the feed-forward network"),
}


def norm(walk: Walkthrough) -> Step:
    """The first norm of a layer: the last token's vector, normalized in Python floats."""
    name, eps = walk.norms[0], walk.config.norm_eps
    hook, normalized = NORM_INPUTS[name]
    before = walk.manual[hook] if hook else walk.block_input
    x, out = before[0, -1].float().tolist(), walk.manual[name]
    weight = walk.block_parameter(f"{name}.weight")
    mean = 0.0 if walk.is_rms_norm else math.fsum(x) / len(x)
    mean_square = math.fsum((value - mean) ** 2 for value in x) / len(x)
    root = math.sqrt(mean_square + eps)
    divided = torch.tensor([(value - mean) / root for value in x])
    shown = {"x": before[0, -1], "divided": divided, "weight": weight}
    if walk.is_rms_norm:
        manual = divided.to(weight) * weight
        excerpts = sources((rms_norm, "wide =", "return"), (RMSNorm.forward, "return"))
        text = f"the mean of its {len(x)} squares is {mean_square:.6g}; with eps {eps:g} the root "
        text += f"is {root:.6g}. Every number is divided by it"
    else:
        manual, excerpts = divided * weight.float(), sources((layer_norm,))
        text = f"the mean of its {len(x)} numbers is {mean:.6g} and their variance "
        text += f"{mean_square:.6g}; with eps {eps:g} the standard deviation is {root:.6g}. The "
        text += "mean is subtracted from every number, which is divided by the standard deviation"
        if (bias := walk.bias(name)) is not None:
            shown["bias"], manual = bias, manual + bias.float()
    others = "Attention reads the residual stream without a norm. " if hook else ""
    if len(walk.norms) > 2:
        others = f"A layer has {len(walk.norms)} norms: {', '.join(walk.norms)}. "
    numbers = [Numbers(label, values) for label, values in shown.items()]
    return Step(
        name="norm",
        title="RMSNorm" if walk.is_rms_norm else "LayerNorm",
        question=f"How is {normalized} normalized?",
        shapes=f"x {shape(before)} → {name} {shape(out)}",
        sources=excerpts,
        text=f"{others}For the last token, {walk.pieces[-1]}: {text}, then multiplied by a learned "
        f"weight per channel. {'' if hook else 'The residual stream itself stays as it is.'}",
        numbers=numbers + walk.numbers({"result": name}),
        checks=[
            *walk.checks(name),
            walk.compare("the last token, in Python floats", manual.to(out), out[0, -1]),
        ],
        command=walk.command(f"--step 5 --layer {walk.config.n_layers - 1}"),
        command_shows="the root is much larger in the last layer: the residual stream grows",
        data={"norm": name, "input": hook or "input", "mean": mean, "mean_square": mean_square,
              "root": root, "eps": eps},
    )  # fmt: skip


def queries_keys_values(walk: Walkthrough) -> Step:
    t, h = walk.manual, walk.head
    q, k, v = (t[f"attention.{name}"] for name in "qkv")
    norms = [name.removeprefix("attention.") for name in walk.qk_norms]
    text = [
        "Three matrices, each read from the file. Queries are compared with keys to compute "
        "attention weights; values are what is added up with these weights. Each result is split "
        f"into heads of {walk.config.head_dim} numbers."
    ]
    if biased := [name for name in "qkv" if name in walk.attention.biases]:
        text.append(f"A learned bias is added to each of {', '.join(biased)}.")
    if norms:
        per = "all heads together" if walk.attention.qk_norm == "full_width" else "every head"
        when = "After RoPE" if walk.attention.qk_norm_after_rope else "Then"
        text.append(
            f"{when} q and k are normalized (QK-norm): an RMSNorm of {per}, with learned weights, "
            "so that scores do not grow with the size of q and k."
        )
    heads = {"q": f"head {h}", "k": f"KV head {walk.kv_head}", "v": f"KV head {walk.kv_head}"}
    shown = {f"{n}, {head}, last token": f"attention.{n}" for n, head in heads.items()}
    return Step(
        name="qkv",
        title="Queries, keys and values",
        question="Which vectors does attention compare, and which does it add up?",
        shapes=f"{shape(walk.block_input)} → q {shape(q)}, k {shape(k)}, v {shape(v)}",
        sources=walk.calls(f"{walk.prefix}.attention", "q", "k", "v", *norms),
        text=" ".join(text),
        numbers=walk.numbers(shown | {name: f"attention.{name}" for name in norms}),
        pictures=[walk.heat_map(f"q of head {h}: one row per token", q[0, h])],
        checks=walk.checks(*shown.values(), *walk.qk_norms),
        command=walk.command(f"--step 6 --head {walk.config.n_heads - 1}"),
        command_shows="the query of another head of the same layer",
    )


def heads_and_groups(walk: Walkthrough) -> Step:
    c, n_kv_heads, size = walk.config, walk.config.n_kv_heads, walk.group_size
    q, k = walk.rotated
    per_head = [q[:, h].float() @ k[:, h // size].float().mT for h in range(c.n_heads)]
    scores = torch.stack(per_head, dim=1) * walk.attention.scale  # (B, H, T, S)
    if cap := walk.attention.softcap:
        scores = cap * torch.tanh(scores / cap)
    per_token = 2 * c.n_layers * c.head_dim * walk.dtype.itemsize
    cache = f"keys and values are cached: {per_token * n_kv_heads:,} bytes per token in all layers"
    title, question = "Heads", "How is attention divided into heads?"
    text = f"Each of the {c.n_heads} query heads has a KV head of its own (multi-head attention, "
    text += f"no groups). Only {cache}."
    if size > 1:
        title = "Heads and groups"
        question = "Why are there fewer KV heads than query heads?"
        text = f"Grouped-query attention: {c.n_heads} query heads share {n_kv_heads} KV heads, "
        text += f"{size} each; query head h uses KV head h // {size}. Only {cache}, instead of "
        text += f"{per_token * c.n_heads:,} with one KV head for each query head."
    return Step(
        name="groups",
        title=title,
        question=question,
        shapes=f"k {shape(k)} → for {c.n_heads} query heads {shape(q)}",
        sources=sources((split_heads, "return"), (attention_scores, "k = k.repeat_interleave")),
        text=text,
        pictures=[Drawing(group_drawing(c.n_heads, n_kv_heads, walk.head))],
        checks=[walk.check(f"{walk.prefix}.attention.scores", scores)],
        command=walk.command(f"--step 9 --head {walk.kv_head * size}"),
        command_shows=f"attention weights of the first query head that uses KV head {walk.kv_head}",
        data={"n_heads": c.n_heads, "n_kv_heads": n_kv_heads, "group_size": size,
              "kv_head_of": [h // size for h in range(c.n_heads)]},
    )  # fmt: skip


def group_drawing(n_heads: int, n_kv_heads: int, chosen: int) -> list[str]:
    """Query heads above, the KV head of each group below; the chosen head in brackets."""
    size = n_heads // n_kv_heads
    cells = [f"[{h}]" if h == chosen else f" {h} " for h in range(n_heads)]
    width = max(map(len, cells))
    # From the middle of the first cell to that of the last one: └────┴────┘
    line = ("─" * (width - 1)).join("└" + "┴" * (size - 2) + "┘") if size > 1 else "│"
    line = (" " * (width // 2) + line).ljust(size * width)
    blocks = []
    for group in range(n_kv_heads):
        top = "".join(c.center(width) for c in cells[group * size : (group + 1) * size])
        mark = f"[{group}]" if group == chosen // size else f"{group}"
        blocks.append((top, line, mark.center(len(top))))
    per_line = max((DRAWING_WIDTH - 8) // (size * width + 1), 1)
    return [
        f"{name:<7} {' '.join(row)}".rstrip()
        for start in range(0, len(blocks), per_line)
        for name, row in zip(
            ("query", "", "KV"), zip(*blocks[start : start + per_line], strict=True), strict=True)
    ]  # fmt: skip


def positions(walk: Walkthrough) -> Step:
    if walk.rope is not None:
        return rope(walk, walk.rope)
    return learned_positions(walk) if walk.plan is None else no_positions(walk)


def rope(walk: Walkthrough, plan: RopePlan) -> Step:
    angles, name, width = walk.angles(walk.positions), f"{walk.prefix}.attention", plan.rotary_dim
    q, q_rope = walk.unrotated, walk.manual["attention.q_rope"]
    rotated = rotate_complex(q[..., :width], angles, plan.layout) * plan.attention_factor
    complex_q = walk.qk_norm(torch.cat((rotated, q[..., width:]), dim=-1), after_rope=True)
    of_part = [(rotate_part, "return torch.cat")] if width < walk.config.head_dim else []
    same = [n for n, other in enumerate(ropes(walk)) if other == plan]
    return Step(
        name="rope",
        title="RoPE: positions as rotations",
        question="How do attention scores depend on the positions of tokens?",
        shapes=f"q {shape(q)}, angles {shape(angles)} → q_rope {shape(q_rope)}",
        sources=sources(
            (rope_angles, "return"), (ROTATE[plan.layout], "a, b =", "rotated =", "return"),
            *of_part,
        )
        + (walk.layer_source if len(same) < walk.config.n_layers else ()),
        text=" ".join([one_pair(walk, plan, angles), *rope_facts(walk, plan)]),
        numbers=[
            Numbers("angles, last token", angles[0, -1]),
            Numbers("q before", q[0, walk.head, -1], None if walk.qk_norms else f"{name}.q"),
            *walk.numbers({"q after": "attention.q_rope"}),
        ],
        pictures=[Drawing(layout_drawing(width, plan.layout)), angle_table(walk, angles)],
        checks=[
            *walk.checks("attention.q_rope", "attention.k_rope"),
            walk.compare("q_rope by complex numbers", complex_q, walk.trace[f"{name}.q_rope"]),
        ],
        command=walk.command("--rope-layout wrong"),
        command_shows="the other layout: all shapes are right, and short prompts often look right",
        data={"layout": plan.layout, "frequencies": walk.frequencies, "layers": same},
    )  # fmt: skip


def ropes(walk: Walkthrough) -> list[RopePlan | None]:
    """The RoPE of every layer."""
    return [] if walk.plan is None else [block.attention.rope for block in walk.plan.blocks]


def rope_facts(walk: Walkthrough, plan: RopePlan) -> Iterator[str]:
    """Sentences: what follows the rotation, how fast the pairs rotate, what other layers do."""
    c = walk.config
    if walk.attention.qk_norm_after_rope and walk.attention.qk_norm != "none":
        yield "Then the whole head is divided by its RMS (qk_norm)."
    if plan.rotary_dim < c.head_dim:
        yield f"Only the first {plan.rotary_dim} of the {c.head_dim} coordinates are rotated."
    if plan.attention_factor != 1:
        yield f"Rotated numbers are multiplied by {plan.attention_factor:.4g} (attention factor)."
    is_scaled = plan.base is None or plan.frequencies[0] != 1
    scaled = ", changed by the configuration's rope_scaling" if is_scaled else ""
    yield f"Later pairs rotate more slowly (theta {plan.base or c.rope_theta:,.0f}{scaled})."
    yield "The score of a query and a key depends on the difference of their positions only."
    others = [n for n, other in enumerate(ropes(walk)) if other not in (plan, None)]
    without = [n for n, other in enumerate(ropes(walk)) if other is None]
    if others:
        yield f"Other frequencies: layers {', '.join(map(str, others))}."
    if without:
        yield f"No RoPE: layers {', '.join(map(str, without))}."


def no_positions(walk: Walkthrough) -> Step:
    """For layers without positional encoding."""
    q = walk.qk_norm(walk.unrotated, after_rope=True)
    rotated = [n for n, plan in enumerate(ropes(walk)) if plan is not None]
    return Step(
        name="positions",
        title="No positions in this layer (NoPE)",
        question="How do attention scores depend on the positions of tokens?",
        shapes=f"q {shape(q)} → q_rope {shape(q)}, not rotated",
        sources=walk.calls(f"{walk.prefix}.attention", "encode_positions") + walk.layer_source,
        text=f"Layer {walk.layer} has no positional encoding: queries and keys are not rotated. "
        "Only the causal mask distinguishes the order of the tokens. RoPE is in "
        + (f"layers {', '.join(map(str, rotated))}." if rotated else "no layer."),
        numbers=walk.numbers({"q": "attention.q", "q_rope": "attention.q_rope"}),
        checks=[
            *walk.checks("attention.q_rope", "attention.k_rope"),
            walk.compare("q_rope is q, not rotated", q, walk.manual["attention.q_rope"]),
        ],
        command=walk.command(f"--step 8 --layer {(rotated or [0])[0]}"),
        command_shows="a layer with RoPE" if rotated else "the first layer",
    )


def one_pair(walk: Walkthrough, plan: RopePlan, angles: Tensor) -> str:
    """The first pair of the last token's query, rotated as a complex number."""
    position = len(walk.ids) - 1
    pair = (0, 1) if plan.layout == "interleaved" else (0, plan.rotary_dim // 2)
    a, b = (float(walk.unrotated[0, walk.head, -1, n]) for n in pair)
    frequency, angle = float(walk.frequencies[0]), float(angles[0, -1, 0])
    rotated = complex(a, b) * cmath.rect(1, angle)
    return (
        f"Two coordinates are read as a complex number a + bi. Position {position} rotates the "
        f"first pair by {position} × {frequency:.4g} = {angle:.4f} radians: ({a:.4f} {b:+.4f}i) · "
        f"e^({angle:.4f}i) = {rotated.real:.4f} {rotated.imag:+.4f}i."
    )


def layout_drawing(width: int, layout: str) -> list[str]:
    """Which of the rotated coordinates of a head form a pair, in both layouts."""
    half = width // 2
    first = range(min(4, half - 1))
    more = "  …  " if half - 1 > len(first) else "  " * bool(first)
    drawn = []
    for name in ("interleaved", "half"):
        step, distance = (2, 1) if name == "interleaved" else (1, half)
        pairs = [f"{step * n}─{step * n + distance}" for n in (*first, half - 1)]
        mark = "  ← this checkpoint" if name == layout else ""
        drawn.append(f"{name:<11}  {'  '.join(pairs[:-1])}{more}{pairs[-1]}{mark}")
    return drawn


def angle_table(walk: Walkthrough, angles: Tensor) -> Table:
    """The direction of each pair at each position; 0 radians is to the right."""
    pairs = range(0, angles.shape[-1], -(-angles.shape[-1] // SHOWN_PAIRS))
    rows = [
        (n, walk.pieces[n], *(arrow(float(angles[0, n, p])) for p in pairs)) for n in walk.shown
    ]
    columns = ["position>", "token", *(f"{pair}>" for pair in pairs)]
    return Table(columns, rows, title="angle of each pair of coordinates (0 is to the right)")


def arrow(angle: float) -> str:
    return ARROWS[round(angle / (2 * math.pi) * len(ARROWS)) % len(ARROWS)]


def learned_positions(walk: Walkthrough) -> Step:
    """For models that add a learned vector per position to the embeddings instead of RoPE."""
    rows = embedding_rows(walk)
    x, vectors = rows["tok_embeddings"], rows["pos_embeddings"]
    directions = torch.nn.functional.normalize(vectors[0, walk.shown.start :].float(), dim=-1)
    cosines, labels = (directions @ directions.T).numpy(), [str(n) for n in walk.shown]
    return Step(
        name="positions",
        title="Positions: one learned vector each",
        question="How do attention scores depend on the positions of tokens?",
        shapes=f"tokens {shape(x)} + positions {shape(vectors)} → x {shape(x)}",
        sources=sources((walk.implementation().hidden, "positions, mask =", "x = self.embeddings")),
        text="This model has no RoPE: queries and keys are not rotated. Instead the row of "
        "pos_embeddings for each position is added to the embedding of its token before the first "
        f"layer. There are {walk.config.max_seq_len:,} rows, so no text can be longer.",
        numbers=embedding_numbers(rows, f"token {walk.pieces[-1]}"),
        pictures=[HeatMap("cosine similarity of the vectors of positions", cosines, labels, 1.0)],
        checks=[walk.check(hook, rows[hook]) for hook in ("pos_embeddings", "embeddings")],
        command=walk.command("--step 8"),
        command_shows="a longer prompt: neighboring positions have similar vectors",
        data={"position_norms": vectors[0].float().norm(dim=-1)},
    )


def attention_weights_step(walk: Walkthrough) -> Step:
    h, weights, (q, k) = walk.head, walk.manual["attention.weights"], walk.rotated
    plan, entropy, last = walk.attention, attention_entropy(weights)[0], weights[0, h, -1]
    visible = min(len(walk.ids), plan.window or len(walk.ids))
    largest = zip(*last.topk(min(3, visible)), strict=True)
    top = ", ".join(f"{walk.pieces[int(n)]} {float(w):.0%}" for w, n in largest)
    title = f"layer {walk.layer}, head {h}: rows are queries, columns are keys"
    shown = {"scores, last token": "attention.scores", "weights, last token": "attention.weights"}
    hidden = None
    excerpts: list[tuple[Any, ...]] = [
        (attention_scores, "return"),
        (attention_weights, "hidden =", "return"),
    ]
    if plan.softcap is not None:
        excerpts.append((soft_cap, "return"))
    if plan.window is not None:
        title += "; × is hidden by the mask"
        hidden = ~visible_mask(plan, len(walk.ids), len(walk.ids))[0, 0].numpy()
        excerpts.append((window_mask, "where =", "last =", "return"))
    return Step(
        name="attention",
        title="Scores, mask, softmax",
        question="How much attention does each token pay to the tokens before it?",
        shapes=f"q {shape(q)}, k {shape(k)} → weights {shape(weights)}",
        sources=sources(*excerpts) + (walk.layer_source if plan.window else ()),
        text=f"{score_text(plan)} The causal mask sets "
        "scores of later tokens to -∞, so that their weight is 0; softmax makes the weights of "
        f"each row sum to one.{window_text(walk)} Head {h}, last token: {top}. Entropy "
        f"{float(entropy[h, -1]):.2f} bits (0: one token gets all attention; "
        f"{math.log2(visible):.2f}: all {visible} get the same).",
        numbers=walk.numbers(shown),
        pictures=[
            HeatMap(
                title, weights[0, h].float().numpy(), walk.pieces, 1.0, triangle=True,
                hidden=hidden,
            )
        ],
        checks=walk.checks("attention.scores", "attention.weights"),
        command=walk.command("--no-mask"),
        command_shows="without the mask every token also attends to the tokens after it",
        data={"entropy_bits": entropy, "window": plan.window},
    )  # fmt: skip


def score_text(plan: AttentionPlan) -> str:
    """How a score is computed, before the mask."""
    text = "The score of a query and a key is their product, divided by √D."
    if not plan.has_usual_scale:
        text = f"The score of a query and a key is their product, multiplied by {plan.scale:.6g}, "
        text += f"a scale of this model (1/√D would be {usual_scale(plan.head_dim):.6g})."
    if plan.softcap is not None:
        text += f" A soft cap, {plan.softcap:g} · tanh(score / {plan.softcap:g}), keeps all scores "
        text += f"between -{plan.softcap:g} and {plan.softcap:g}."
    return text


def window_text(walk: Walkthrough) -> str:
    """What the sliding window of the layer hides, if it has one."""
    if (window := walk.attention.window) is None:
        return ""
    first = max(len(walk.ids) - window, 0)
    text = f" This layer has a sliding window of {window:,} tokens: a query sees itself and the "
    text += f"{window - 1:,} tokens before it. "
    if first == 0:
        return text + "This prompt is not longer, so that nothing is hidden."
    return text + f"For the last token the positions 0 to {first - 1} are hidden."


def head_contributions(walk: Walkthrough) -> Tensor:
    """What each head adds to the residual stream through its columns of wo: (H, T, C)."""
    c, wo = walk.config, walk.block_parameter("attention.wo.weight").float()
    columns = wo.reshape(c.dim, c.n_heads, c.head_dim)
    return torch.einsum("chd,htd->htc", columns, walk.manual["attention.heads"][0].float())


def attention_output(walk: Walkthrough) -> Step:
    t, prefix, parts = walk.manual, walk.prefix, head_contributions(walk)
    total, bias = parts.sum(0)[None], walk.bias("attention.wo")
    total = total if bias is None else total + bias.float()
    lengths = parts[:, -1].norm(dim=-1).tolist()
    extra = [name for name in walk.norms if name == "post_attention_norm"]
    shown = {
        f"head {walk.head}": "attention.heads", "output of wo": "attention.wo",
        **{name: name for name in extra}, "x + output": "after_attention",
    }  # fmt: skip
    wo, after, weights = t["attention.wo"], t["after_attention"], t["attention.weights"]
    norms = [f"{float(x[0, -1].float().norm()):.3f}" for x in (walk.block_input, after)]
    rows = [(f"head {h}", length, f"{length:.3f}") for h, length in enumerate(lengths)]
    return Step(
        name="residual",
        title="Weighted sum, wo, residual",
        question="What does attention add to the residual stream?",
        shapes=f"weights {shape(weights)}, v {shape(t['attention.v'])} → {shape(after)}",
        sources=sources(
            (weighted_sum, "v =", "return"),
            (walk.implementation(f"{prefix}.attention").forward, "return"),
        )
        + walk.calls(prefix, "attention", *extra, "after_attention"),
        text="Each head adds up the values of the visible tokens, multiplied by its attention "
        "weights. The matrix wo maps the heads, joined to one vector, to the width of the model. "
        f"The result is {walk.before_adding(*extra)}added to the residual stream, whose vector for "
        f"the last token changes its norm from {norms[0]} to {norms[1]}.",
        numbers=walk.numbers(shown),
        pictures=[Bars("what each head adds to the last token (L2 norm, after wo)", rows)],
        checks=[
            *walk.checks(*shown.values()),
            walk.compare("contributions of all heads, added up", total.to(wo), wo),
        ],
        command=walk.command("--scale wrong"),
        command_shows="scores that are not scaled: nearly all weight is on one token",
        data={"head_contributions": lengths},
    )


STEPS = (
    norm, queries_keys_values, heads_and_groups, positions, attention_weights_step, attention_output
)  # fmt: skip
