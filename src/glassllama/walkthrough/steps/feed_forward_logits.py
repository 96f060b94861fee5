"""Steps 11 to 13: the feed-forward part, all layers, and the logits that come out."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glassllama.models.llama import Block, Llama
from glassllama.nn.feed_forward import FeedForward
from glassllama.nn.norm import RMSNorm, rms_norm
from glassllama.walkthrough.analysis import Predictions, predictions, residual_norms
from glassllama.walkthrough.manual_block import layer_by_hand
from glassllama.walkthrough.pictures import Bars, Table
from glassllama.walkthrough.step import (
    Check,
    Numbers,
    Step,
    WhatIf,
    source,
)
from glassllama.walkthrough.steps.input import embedding_rows
from glassllama.walkthrough.walk import Walk, shape

FEATURES = 10  # of the feed-forward part, shown
NEARLY_SHUT = 0.05  # |silu(gate)| below this lets next to nothing pass
FAMOUS = "the answer to the ultimate question of life, the universe, and everything is"
ANSWER = "42"
TOP = 10
ROWS = 8192  # of the output matrix, multiplied at a time: it may be a gigabyte


def swiglu(walk: Walk) -> Step:
    hand, prefix = walk.by_hand, f"{walk.prefix}.feed_forward"
    opened = F.silu(hand.gate)[0, -1].float()  # (F,)
    shut = float((opened.abs() < NEARLY_SHUT).float().mean())
    return Step(
        number=11,
        name="swiglu",
        title="SwiGLU: a gate for every feature",
        question="What is done with what was heard?",
        shapes=f"ffn_norm {shape(hand.ffn_norm)} → gated {shape(hand.gated)} → {shape(hand.down)}",
        sources=(
            source(FeedForward.forward, "features =", "return"),
            source(Block.forward, "return"),
        ),
        text=(
            f"{walk.config.ffn_dim:,} features. up says how strongly each is there, gate whether "
            "it may pass: silu(z) = z / (1 + e^-z) is near 0 below zero and near z above. For the "
            f"last token {shut:.0%} of the gates are nearly shut. down turns what is left into a "
            "vector that is added to the residual stream.",
        ),
        numbers=(
            Numbers("gate", hand.gate[0, -1], f"{prefix}.gate"),
            Numbers("silu(gate)", opened),
            Numbers("up", hand.up[0, -1], f"{prefix}.up"),
            Numbers("silu(gate)·up", hand.gated[0, -1], f"{prefix}.gated"),
            Numbers("down", hand.down[0, -1], f"{prefix}.down"),
        ),
        pictures=(feature_bars(hand.gate[0, -1], hand.up[0, -1], hand.gated[0, -1]),),
        checks=(
            *walk.checks("ffn_norm", "gate", "up", "gated", "down"),
            walk.check(walk.prefix, hand.output),
        ),
        what_if=WhatIf(
            command=walk.command(f"--step 11 --layer {walk.config.n_layers - 1}"),
            shows="the last layer opens other gates, and a few features shout",
        ),
        data={"nearly_shut": shut},
    )


def feature_bars(gate: Tensor, up: Tensor, gated: Tensor) -> Bars:
    loudest = gated.float().abs().topk(min(FEATURES, len(gated)))
    ids = loudest.indices.tolist()
    return Bars(
        "the loudest features of the last token",
        [f"feature {n}" for n in ids],
        loudest.values.tolist(),
        [f"{float(gate[n]):8.3f} gate {float(up[n]):8.3f} up {float(gated[n]):9.3f}" for n in ids],
    )


def layers_by_hand(walk: Walk) -> Check:
    """From the embeddings through every layer, weights read one tensor at a time -> the worst."""
    x, errors = embedding_rows(walk), []
    for n in range(walk.config.n_layers):
        place = f"layers.{n}"
        formula = f"{place}.attention.weights" in walk.trace  # as the model itself did
        weight = partial(walk.layer_weight, n)
        x = layer_by_hand(weight, x, walk.rope, walk.config, formula=formula).output
        errors.append(walk.compare_runs(place, x, walk.trace[place]))
    worst = max(errors, key=lambda check: check.relative)
    return replace(worst, what=f"layers.0 … layers.{walk.config.n_layers - 1}")


def all_layers(walk: Walk) -> Step:
    c, x = walk.config, shape(walk.residual_before)
    norms = residual_norms(walk.trace)[:, 0]  # (L + 1, T)
    return Step(
        number=12,
        name="layers",
        title="All layers",
        question="What happens to a token on its way up?",
        shapes=f"x {x} → {c.n_layers} layers → {x}",
        sources=(
            source(Block.forward, "x =", "return"),
            source(Llama.hidden, "for layer", "x = layer"),
        ),
        text=(
            "Every layer adds to the residual stream, and none replaces it. The logit lens reads "
            "the stream as if it were finished: last norm, output matrix, likeliest token. All "
            "layers were worked out by hand once more, from the embeddings on.",
        ),
        pictures=(layer_bars(walk, norms[:, -1]),),
        checks=(layers_by_hand(walk),),
        what_if=WhatIf(
            command=walk.command("--step 12"),
            shows="change the last word of the prompt: from which layer on does the answer differ?",
        ),
        data={"residual_norms": norms.tolist()},
    )


def layer_bars(walk: Walk, norms: Tensor) -> Bars:
    """Norms (L + 1,) of the last token's vector, with what the lens reads there."""
    ids, probs = walk.lens.ids[:, 0, -1, 0].tolist(), walk.lens.probs[:, 0, -1, 0].tolist()
    said = [f"{p:4.0%} {walk.piece(i)[:14]}" for i, p in zip(ids, probs, strict=True)]
    return Bars(
        "length of the last token's vector, and what it would say there",
        ["embedding", *(f"layer {n}" for n in range(walk.config.n_layers))],
        norms.tolist(),
        [f"{length:9.2f}  {word:<19}" for length, word in zip(norms.tolist(), said, strict=True)],
    )


def logits_by_hand(walk: Walk, normed: Tensor) -> Tensor:
    """(1, T, C) -> (1, T, V) float32; the output matrix is read a block of rows at a time."""
    c = walk.config
    name = "tok_embeddings.weight" if c.tie_embeddings else "output.weight"
    blocks = []
    for start in range(0, c.vocab_size, ROWS):
        rows = walk.checkpoint.float32(name, slice(start, min(start + ROWS, c.vocab_size)))
        blocks.append(F.linear(normed, torch.from_numpy(rows).to(normed.dtype)).float())
        walk.checkpoint.release_pages(name)
    return torch.cat(blocks, dim=-1)


def famous_note(walk: Walk, likeliest: int) -> tuple[str, ...]:
    """For the prompt of many tutorials: who knows how it goes on, where this model does not."""
    if (walk.prompt or "").strip().lower() != FAMOUS or ANSWER.startswith(walk.piece(likeliest)):
        return ()
    count = sum(math.prod(walk.checkpoint.info(name).shape) for name in walk.checkpoint.names)
    return (
        f"With {count / 1e6:,.0f} million parameters this model does not know the book that the "
        f"prompt is from. Llama-3-8B does: there the likeliest token is {ANSWER}, before 6, 43 "
        "and 41.",
    )


def answer(walk: Walk) -> Step:
    c, last = walk.config, walk.trace[f"layers.{walk.config.n_layers - 1}"]
    normed = rms_norm(last, c.norm_eps) * walk.weight("norm")  # (1, T, C)
    logits = logits_by_hand(walk, normed)
    top = predictions(logits[0, -1], TOP)
    plain = "logits of a run that nobody watches"
    return Step(
        number=13,
        name="logits",
        title="Last norm, logits, top ten",
        question="How does a vector become a next token?",
        shapes=f"x {shape(last)} → norm {shape(normed)} → logits {shape(logits)}",
        sources=(
            source(RMSNorm.forward, "return"),
            source(Llama.logits, f"logits = {'F.linear' if c.tie_embeddings else 'self.output'}"),
        ),
        text=(
            f"Each of the {c.vocab_size:,} rows of "
            f"{'the embedding matrix, used again,' if c.tie_embeddings else 'the output matrix'} "
            "is compared with the vector; softmax makes the logits probabilities. The model "
            "predicts after every position at once; only the last one continues the text.",
            *famous_note(walk, int(top.ids[0])),
        ),
        numbers=(
            Numbers("norm, last token", normed[0, -1], "norm"),
            Numbers("logits, last token", logits[0, -1], "last_logits"),
        ),
        pictures=(top_bars(walk, top, logits[0, -1]), position_table(walk)),
        checks=(
            walk.check("norm", normed),
            walk.check("last_logits", logits),
            walk.compare_runs(plain, logits, walk.plain_logits),
        ),
        what_if=WhatIf(
            command=walk.command("--step 13"),
            shows="give the prompt one more word, and look what it was expected to be",
        ),
        data={"top": [{"id": i, "piece": walk.piece(i), "probability": p}
                      for i, p in zip(top.ids.tolist(), top.probs.tolist(), strict=True)]},
    )  # fmt: skip


def top_bars(walk: Walk, top: Predictions, logits: Tensor) -> Bars:
    ids = top.ids.tolist()
    return Bars(
        "the likeliest next tokens",
        [walk.piece(i) for i in ids],
        top.probs.tolist(),
        [
            f"{p:6.1%}  logit {float(logits[i]):7.3f}"
            for i, p in zip(ids, top.probs.tolist(), strict=True)
        ],
        top=1.0,
    )


def position_table(walk: Walk) -> Table:
    """What the model expected after every position, and what it thought of what came."""
    best = walk.expected
    rows = []
    for n in walk.shown:
        probs = walk.logits[0, n].softmax(-1)  # (V,)
        came = "" if n + 1 == len(walk.ids) else f"{float(probs[walk.ids[n + 1]]):.1%}"
        expected, p = walk.piece(int(best.ids[n, 0])), float(best.probs[n, 0])
        rows.append((n, walk.pieces[n], expected, f"{p:.1%}", came))
    return Table(["position>", "token", "expected next", "with>", "what came had>"], rows)
