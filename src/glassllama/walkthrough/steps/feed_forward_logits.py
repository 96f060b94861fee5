"""Steps 11 to 13: the feed-forward network, all layers, the logits."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from glassllama.nn.norm import RMSNorm, rms_norm
from glassllama.walkthrough.analysis import predictions, residual_norms
from glassllama.walkthrough.manual_block import layer_norm
from glassllama.walkthrough.pictures import Bars, Table
from glassllama.walkthrough.step import Check, Numbers, Step, source
from glassllama.walkthrough.steps.input import block_0_input, parameters_in_file
from glassllama.walkthrough.walkthrough import Walkthrough, shape

SHOWN_FEATURES = 10
NEARLY_CLOSED = 0.05  # |activation| below this: the feature has next to no effect
FAMOUS = "the answer to the ultimate question of life, the universe, and everything is"
FAMOUS_ANSWER = "42"
TOP = 10
ROWS = 8192  # of the output matrix, multiplied at a time: it may be a gigabyte


def feed_forward(walk: Walkthrough) -> Step:
    c, t, prefix = walk.config, walk.manual, f"{walk.prefix}.feed_forward"
    up, down = t["feed_forward.up"], t["feed_forward.down"]
    names: tuple[str, ...]
    if walk.is_gated:
        names, features = ("gate", "up", "gated", "down"), t["feed_forward.gated"]
        activation = F.silu(t["feed_forward.gate"])[0, -1].float()  # (F,)
        title, label = "SwiGLU feed-forward network", "silu(gate)·up"
        text = (
            "up computes the features, and each is multiplied by its gate, silu(gate), where "
            "silu(z) = z / (1 + e^-z) is near 0 for negative z and near z for positive z. "
        )
    else:
        names, features = ("up", "activated", "down"), t["feed_forward.activated"]
        activation, label = features[0, -1].float(), f"{c.activation}(up)"
        title = f"Feed-forward network with {c.activation.split('_')[0].upper()}"
        text = f"up computes the features and {c.activation} is applied to each: " + (
            "it sets negative numbers to 0. "
            if c.activation == "relu"
            else "its result is near 0 for negative inputs and near the input for positive ones. "
        )
    closed = float((activation.abs() < NEARLY_CLOSED).float().mean())
    numbers = [
        Numbers(name, t[f"feed_forward.{name}"][0, -1], f"{prefix}.{name}") for name in names
    ]
    return Step(
        name="swiglu" if walk.is_gated else "feed_forward",
        title=title,
        question="What does the feed-forward network add to the residual stream?",
        shapes=f"ffn_norm {shape(t['ffn_norm'])} → {label} {shape(features)} → {shape(down)}",
        sources=(
            source(walk.implementation(prefix).forward, "features =", "return"),
            source(walk.implementation(walk.prefix).forward, "return"),
        ),
        text=(
            f"{c.ffn_dim:,} features for each token. {text}For the last token {closed:.0%} of the "
            "activations are nearly 0. down maps the features to a vector that is added to the "
            "residual stream.",
        ),
        numbers=(Numbers("ffn_norm", t["ffn_norm"][0, -1], f"{walk.prefix}.ffn_norm"), *numbers),
        pictures=(largest_features(walk, features[0, -1], up[0, -1]),),
        checks=(
            *walk.checks("ffn_norm", *(f"feed_forward.{name}" for name in names)),
            walk.check(walk.prefix, t["output"]),
        ),
        command=walk.command(f"--step 11 --layer {c.n_layers - 1}"),
        command_shows="in the last layer other features are active, and a few are very large",
        data={"nearly_closed": closed},
    )


def largest_features(walk: Walkthrough, features: Tensor, up: Tensor) -> Bars:
    """The features (F,) of the last token with the largest sizes."""
    largest = features.float().abs().topk(min(SHOWN_FEATURES, len(features)))
    ids = largest.indices.tolist()
    notes = [f"{float(up[n]):8.3f} up {float(features[n]):9.3f}" for n in ids]
    if walk.is_gated:
        gate = walk.manual["feed_forward.gate"][0, -1]
        notes = [f"{float(gate[n]):8.3f} gate {note}" for n, note in zip(ids, notes, strict=True)]
    labels = [f"feature {n}" for n in ids]
    return Bars("the largest features of the last token", labels, largest.values.tolist(), notes)


def check_all_layers(walk: Walkthrough) -> Check:
    """Every layer computed from the embeddings on, weights read from the file: the worst check."""
    x, checks = block_0_input(walk), []
    for n in range(walk.config.n_layers):
        name = f"layers.{n}"
        fused = f"{name}.attention.weights" not in walk.trace  # as in the traced run
        x = walk.compute_block(n, x, rope=walk.rope(), fused=fused)["output"]
        checks.append(walk.compare_runs(name, x, walk.trace[name]))
    worst = max(checks, key=lambda check: check.relative)
    return replace(worst, what=f"layers.0 … layers.{walk.config.n_layers - 1}")


def all_layers(walk: Walkthrough) -> Step:
    x, count = shape(walk.block_input), walk.config.n_layers
    norms = residual_norms(walk.trace)[:, 0]  # (L + 1, T)
    return Step(
        name="layers",
        title="All layers",
        question="How does the residual stream change from layer to layer?",
        shapes=f"x {x} → {count} layers → {x}",
        sources=(
            source(walk.implementation("layers.0").forward, "x =", "return"),
            source(walk.implementation().hidden, "for layer", "x = layer"),
        ),
        text=(
            "Every layer adds to the residual stream. The logit lens applies the last norm and the "
            "output matrix to the residual stream between layers, and shows the most probable "
            "token there. For the check all layers were computed once more, from the embeddings.",
        ),
        pictures=(lens_bars(walk, norms[:, -1]),),
        checks=(check_all_layers(walk),),
        command=walk.command("--step 12"),
        command_shows="another last word in the prompt: from which layer on does the lens differ?",
        data={"residual_norms": norms.tolist()},
    )


def lens_bars(walk: Walkthrough, norms: Tensor) -> Bars:
    """Norms (L + 1,) of the last token's vector, with the prediction of the logit lens there."""
    ids, probs = walk.lens.ids[:, 0, -1, 0].tolist(), walk.lens.probs[:, 0, -1, 0].tolist()
    predicted = [f"{p:4.0%} {walk.piece(i)[:14]}" for i, p in zip(ids, probs, strict=True)]
    return Bars(
        "L2 norm of the last token's vector, and the prediction of the logit lens",
        ["embedding", *(f"layer {n}" for n in range(walk.config.n_layers))],
        norms.tolist(),
        [f"{x:9.2f}  {text:<19}" for x, text in zip(norms.tolist(), predicted, strict=True)],
    )


def manual_last_norm(walk: Walkthrough) -> Tensor:
    x, eps = walk.trace[f"layers.{walk.config.n_layers - 1}"], walk.config.norm_eps
    weight = walk.parameter("norm.weight")
    if walk.is_rms_norm:
        return rms_norm(x, eps) * weight  # (1, T, C)
    bias = walk.parameter("norm.bias") if walk.config.bias else None
    return layer_norm(x, weight, bias, eps)


def manual_logits(walk: Walkthrough, normed: Tensor) -> Tensor:
    """(1, T, C) -> (1, T, V) float32; a block of rows of the output matrix at a time."""
    c = walk.config
    name = "tok_embeddings.weight" if c.tie_embeddings else "output.weight"
    blocks = []
    for start in range(0, c.vocab_size, ROWS):
        rows = walk.checkpoint.float32(name, slice(start, min(start + ROWS, c.vocab_size)))
        blocks.append(F.linear(normed, torch.from_numpy(rows).to(normed.dtype)).float())
        walk.checkpoint.release_pages(name)
    return torch.cat(blocks, dim=-1)


def last_logits(walk: Walkthrough) -> Step:
    c, model = walk.config, walk.implementation()
    x = walk.trace[f"layers.{c.n_layers - 1}"]
    normed = manual_last_norm(walk)
    logits = manual_logits(walk, normed)
    top = predictions(logits[0, -1], TOP)
    probs = list(zip(top.ids.tolist(), top.probs.tolist(), strict=True))
    norm_source = source(RMSNorm.forward, "return") if walk.is_rms_norm else source(layer_norm)
    matrix = "the embedding matrix, used again" if c.tie_embeddings else "the output matrix"
    return Step(
        name="logits",
        title="Last norm, logits, top ten",
        question="How does the last vector become a probability for every token?",
        shapes=f"x {shape(x)} → norm {shape(normed)} → logits {shape(logits)}",
        sources=(
            norm_source,
            source(model.logits, f"logits = {'F.linear' if c.tie_embeddings else 'self.output'}"),
        ),
        text=(
            f"The logits are the products of the vector with the {c.vocab_size:,} rows of "
            f"{matrix}; softmax makes them probabilities. The model predicts the next token after "
            "every position; only the last prediction continues the text.",
            *famous_note(walk, int(top.ids[0])),
        ),
        numbers=(
            Numbers("norm, last token", normed[0, -1], "norm"),
            Numbers("logits, last token", logits[0, -1], "last_logits"),
        ),
        pictures=(
            Bars(
                "the most probable next tokens",
                [walk.piece(i) for i, _ in probs],
                [p for _, p in probs],
                [f"{p:6.1%}  logit {float(logits[0, -1, i]):7.3f}" for i, p in probs],
                top=1.0,
            ),
            prediction_table(walk),
        ),
        checks=(
            walk.check("norm", normed),
            walk.check("last_logits", logits),
            walk.compare_runs("logits of a run without hooks", logits, walk.plain_logits),
        ),
        command=walk.command("--step 13"),
        command_shows="add a word to the prompt: the table shows which probability it had",
        data={"top": [{"id": i, "piece": walk.piece(i), "probability": p} for i, p in probs]},
    )


def famous_note(walk: Walkthrough, top: int) -> tuple[str, ...]:
    """For a prompt of many tutorials: the answer of a larger model, if this one has another."""
    if (walk.prompt or "").strip().lower() != FAMOUS or FAMOUS_ANSWER.startswith(walk.piece(top)):
        return ()
    return (
        f"With {parameters_in_file(walk.checkpoint) / 1e6:,.0f} million parameters this model does "
        "not know the book that the prompt is from. For Llama-3-8B the most probable token is "
        f"{FAMOUS_ANSWER}, before 6, 43 and 41.",
    )


def prediction_table(walk: Walkthrough) -> Table:
    """The prediction after every position, and the probability of the token that follows."""
    best = walk.predictions
    rows = []
    for n in walk.shown:
        probs = walk.logits[0, n].softmax(-1)  # (V,)
        following = "" if n + 1 == len(walk.ids) else f"{float(probs[walk.ids[n + 1]]):.1%}"
        predicted, p = walk.piece(int(best.ids[n, 0])), float(best.probs[n, 0])
        rows.append((n, walk.pieces[n], predicted, f"{p:.1%}", following))
    columns = ["position>", "token", "prediction", "probability>", "of the following token>"]
    return Table(columns, rows)
