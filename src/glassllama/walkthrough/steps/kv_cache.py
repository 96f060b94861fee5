"""Step 15: the second token, and all that the cache saves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from glassllama.nn.attention import Attention
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.rope import rope_angles, rope_table
from glassllama.walkthrough.analysis import predictions
from glassllama.walkthrough.manual_block import LayerByHand, layer_by_hand
from glassllama.walkthrough.pictures import Drawing
from glassllama.walkthrough.step import Numbers, Step, WhatIf, source
from glassllama.walkthrough.trace import Trace, run_with_trace
from glassllama.walkthrough.walk import Walk, shape

WIDEST_CACHE = 40  # tokens drawn


@dataclass(frozen=True)
class NextToken:
    """A likeliest token, its probability, and how many tokens were in the cache by then."""

    id: int
    probability: float
    cached: int


def next_token(logits: Tensor, cached: int) -> NextToken:
    best = predictions(logits)
    return NextToken(int(best.ids[0]), float(best.probs[0]), cached)


def continued(walk: Walk, cache: KVCache, logits: Tensor) -> list[NextToken]:
    """The likeliest tokens one after the other, each fed alone, until the cache is full."""
    made = [next_token(logits, cache.lengths[0])]
    while cache.lengths[0] < cache.max_len:
        rows, _ = run_with_trace(walk.model, [made[-1].id], watch=(), cache=cache)
        made.append(next_token(rows[0, -1].cpu(), cache.lengths[0]))
    return made


def new_token_by_hand(walk: Walk, trace: Trace) -> LayerByHand:
    """The chosen layer for the new token alone: old keys and values are those of the prompt."""
    before = "tok_embeddings" if walk.layer == 0 else f"layers.{walk.layer - 1}"
    angles = rope_angles(torch.tensor([[len(walk.ids)]]), walk.model.frequencies)
    return layer_by_hand(
        partial(walk.layer_weight, walk.layer),
        trace[before],
        rope_table(angles),
        walk.config,
        past=(walk.by_hand.k_rope, walk.by_hand.v),
    )


def saved(walk: Walk) -> str:
    """Multiplications of matrices with vectors, with the cache and without."""
    c, past = walk.config, len(walk.ids)
    attention = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
    token = c.n_layers * (attention + 3 * c.dim * c.ffn_dim)
    output = c.dim * c.vocab_size
    alone, again = token + output, (past + 1) * token + output
    return (
        f"That is {alone / 1e6:,.1f} million multiplications instead of {again / 1e6:,.1f} million."
    )


def second_token(walk: Walk) -> Step:
    past, prefix, cache = len(walk.ids), walk.prefix, walk.cache
    cache.truncate(0, past)  # for a walk that has taken this step before
    first = next_token(walk.logits[0, -1], past)
    watch = ("tok_embeddings", "layers.*", "last_logits")
    logits, trace = run_with_trace(walk.model, [first.id], watch=watch, cache=cache)
    whole = run_with_trace(walk.model, [*walk.ids, first.id], watch=())[0][:, -1:]
    hand = new_token_by_hand(walk, trace)
    made = [first, *continued(walk, cache, logits[0, -1].cpu())]
    weights = trace[f"{prefix}.attention.weights"]
    return Step(
        number=15,
        name="cache",
        title="The second token, with the cache",
        question="What need not be computed again?",
        shapes=f"1 new id, {past} cached keys and values → logits {shape(logits)}",
        sources=(
            source(Attention.forward, "if context.cache", "k, v = context.cache"),
            source(KVCache.extend, "cached[:, :, self.lengths"),
        ),
        text=(
            f"{walk.piece(first.id)} is appended and fed alone. The {past} tokens before it cannot "
            "see it, so nothing of theirs changes: their keys and values wait in the cache, and "
            "their queries, feed-forward parts and logits are never needed again. " + saved(walk),
        ),
        numbers=(
            Numbers(f"weights of the new token, head {walk.head}", weights[0, walk.head, -1]),
        ),
        pictures=(cache_drawing(walk, made),),
        checks=(
            walk.compare(f"{prefix}.attention.weights of the new token", hand.weights, weights),
            walk.compare(f"{prefix} of the new token", hand.output, trace[prefix]),
            walk.compare_runs("logits of all tokens again", logits.cpu(), whole.cpu()),
        ),
        what_if=WhatIf(
            command=f"glassllama bench {walk.name} --prompt 64 --new 16",
            shows="tokens a second while reading a prompt, and while writing one by one",
        ),
        data={"continuation": [continuation(walk, token) for token in made]},
    )


def continuation(walk: Walk, token: NextToken) -> dict[str, object]:
    return {
        "id": token.id,
        "piece": walk.piece(token.id),
        "probability": token.probability,
        "cached": token.cached,
    }


def cache_drawing(walk: Walk, made: list[NextToken]) -> Drawing:
    drawn = ["▒ waits in the cache   █ computed now"]
    for token in made:
        more = max(token.cached - WIDEST_CACHE, 0)
        skipped = f"…{more} more " if more else ""
        old = token.cached if token is made[0] else token.cached - 1
        new = "█" * min(token.cached, WIDEST_CACHE) if token is made[0] else "█"
        row = new if token is made[0] else "▒" * min(old, WIDEST_CACHE) + new
        drawn.append(f"{skipped}{row} → {walk.piece(token.id)}  {token.probability:.0%}")
    return Drawing(tuple(drawn))
