"""Steps 14 and 15: one token is sampled from the logits; the next one uses the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassllama.generation.sampler import (
    History,
    Temperature,
    TopP,
    below_largest,
    make_sampler,
    unscaled_probs,
)
from glassllama.nn.kv_cache import KVCache
from glassllama.walkthrough.analysis import predictions
from glassllama.walkthrough.manual_block import Tensors
from glassllama.walkthrough.pictures import Bars, Drawing
from glassllama.walkthrough.step import Numbers, Step, compare, source
from glassllama.walkthrough.steps.attention import rotated
from glassllama.walkthrough.tracing import Trace, trace
from glassllama.walkthrough.walkthrough import Walkthrough, shape

TEMPERATURE, TOP_P = 0.6, 0.9  # of the example programs that Meta published with Llama 3
SHOWN = 10
SEEDS = 8
TIE = 1e-5  # relative difference of probabilities below which float32 may order ids differently
DEPTH = 2  # sums in sequence: the softmax, and once more over the tokens that top-p keeps
CACHE_WIDTH = 40  # tokens drawn
Probs = NDArray[np.float64]


def sampling(walk: Walkthrough) -> Step:
    logits = walk.logits[0, -1]
    plain, scaled = softmax(logits, 1.0), softmax(logits, TEMPERATURE)
    nucleus, by_sampler = nucleus_ids(scaled, TOP_P), sampler_probs(logits)
    manual = nucleus_probs(scaled, nucleus, by_sampler)
    both = (torch.from_numpy(probs).float() for probs in (manual, by_sampler))
    drawn = draws(walk, logits)
    count = f"{len(nucleus):,} candidate{'' if len(nucleus) == 1 else 's'}"
    return Step(
        name="sampling",
        title="Sampling: temperature and top-p",
        question="How is the next token chosen from the probabilities?",
        shapes=f"logits ({len(logits)},) → probabilities → {count} → one id",
        sources=(
            source(Temperature.__call__, "out:"),
            source(below_largest, "out:"),
            source(TopP.__call__, "ordered", "border", "return keep"),
        ),
        text=(
            f"Logits are divided by the temperature {TEMPERATURE}, which makes probable tokens "
            "more probable. Top-p keeps the most probable tokens with a total probability of "
            f"{TOP_P:.0%}: here {len(nucleus)} of {len(logits):,}. A random number selects one of "
            f"them. Seeds 0 to {SEEDS - 1}: {', '.join(walk.piece(id) for id in drawn)}.",
        ),
        pictures=(candidate_bars(walk, plain, scaled, nucleus),),
        checks=(compare("probabilities of the sampler", *both, terms=len(logits), depth=DEPTH),),
        command="glassllama generate PROMPT -n 20 --temperature 1.5 --top-p 1",
        command_shows="a higher temperature without top-p: improbable tokens are sampled",
        data={
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "nucleus": nucleus.tolist(),
            "draws": drawn,
        },
    )


def softmax(logits: Tensor, temperature: float) -> Probs:
    """(V,) -> (V,) in float64."""
    scaled = logits.double().numpy() / temperature
    powers = np.exp(scaled - scaled.max())
    probs: Probs = powers / powers.sum()
    return probs


def nucleus_ids(probs: Probs, p: float) -> NDArray[np.intp]:
    """The most probable ids with a sum of p or more, in descending order; with all ties."""
    order = np.argsort(-probs, kind="stable")
    sums = np.cumsum(probs[order])
    last = min(int(np.searchsorted(sums, p)), len(order) - 1)
    nucleus: NDArray[np.intp] = order[probs[order] >= probs[order[last]]]
    return nucleus


def sampler_probs(logits: Tensor) -> Probs:
    """Probabilities (V,) by the sampler of generation/: temperature, then top-p."""
    history = History([], len(logits))
    filtered = TopP(TOP_P)(Temperature(TEMPERATURE)(logits.numpy(), history), history)
    weights = unscaled_probs(filtered).astype(np.float64)
    probs: Probs = weights / weights.sum()
    return probs


def nucleus_probs(probs: Probs, nucleus: NDArray[np.intp], by_sampler: Probs) -> Probs:
    """Probabilities (V,) of the nucleus alone.

    The sampler computes in float32, so rounding decides which of nearly equal ids are the last of
    the nucleus. For these ids, and only for these, the choice of the sampler is taken.
    """
    last = probs[nucleus[-1]]
    inside = np.where(np.abs(probs - last) <= TIE * last, by_sampler > 0, probs >= last)
    truncated: Probs = np.where(inside, probs, 0.0)
    truncated /= truncated.sum()
    return truncated


def draws(walk: Walkthrough, logits: Tensor) -> list[int]:
    """The id that each of the seeds samples."""
    sampler = partial(make_sampler, temperature=TEMPERATURE, top_p=TOP_P)
    starts = [sampler(seed=seed).start(walk.ids, len(logits)) for seed in range(SEEDS)]
    return [start.choose(logits.numpy()) for start in starts]


def candidate_bars(
    walk: Walkthrough, plain: Probs, scaled: Probs, nucleus: NDArray[np.intp]
) -> Bars:
    order = np.argsort(-plain, kind="stable")[:SHOWN]
    inside = set(nucleus.tolist())
    return Bars(
        f"probability → at temperature {TEMPERATURE}; removed: by top-p {TOP_P}",
        [walk.piece(int(i)) for i in order],
        [float(scaled[i]) for i in order],
        [
            f"{plain[i]:6.1%} → {scaled[i]:6.1%} {'' if int(i) in inside else 'removed':<7}"
            for i in order
        ],
        top=1.0,
    )


@dataclass(frozen=True)
class NextToken:
    """A greedy token, its probability, and the number of tokens in the cache before it."""

    id: int
    probability: float
    cached: int


def next_token(logits: Tensor, cached: int) -> NextToken:
    best = predictions(logits)
    return NextToken(int(best.ids[0]), float(best.probs[0]), cached)


def kv_cache(walk: Walkthrough) -> Step:
    past, prefix, cache = len(walk.ids), walk.prefix, walk.cache
    cache.truncate(0, past)  # this step may have added tokens before
    first = next_token(walk.logits[0, -1], past)
    hooks = ("*embeddings", "layers.*", "last_logits")
    recorded = trace(walk.model, [first.id], hooks=hooks, cache=cache)
    again = trace(walk.model, [*walk.ids, first.id], hooks=()).logits[:, -1:]
    manual = new_token_block(walk, recorded)
    tokens = [first, *greedy_tokens(walk, cache, recorded.logits[0, -1].cpu())]
    weights, logits = recorded[f"{prefix}.attention.weights"], recorded.logits.cpu()
    return Step(
        name="cache",
        title="The second token, with the KV cache",
        question="Which results are reused for the next token?",
        shapes=f"1 new id, {past} cached keys and values → logits {shape(logits)}",
        sources=(
            source(
                walk.implementation(f"{prefix}.attention").forward,
                "if context.cache",
                "k, v = context.cache",
            ),
            source(KVCache.extend, "cached[:, :, self.lengths"),
        ),
        text=(
            f"{walk.piece(first.id)} is appended and is the only input of this forward pass. The "
            f"causal mask hides it from the {past} tokens before it, so their tensors do not "
            "change: their keys and values are in the KV cache, and their queries, feed-forward "
            f"features and logits are not needed again. {saved(walk)}",
        ),
        numbers=(
            Numbers(f"weights of the new token, head {walk.head}", weights[0, walk.head, -1]),
        ),
        pictures=(cache_drawing(walk, tokens),),
        checks=(
            walk.compare(
                f"{prefix}.attention.weights of the new token",
                manual["attention.weights"],
                weights,
            ),
            walk.compare(f"{prefix} of the new token", manual["output"], recorded[prefix]),
            walk.compare_runs("logits without a cache", logits, again.cpu()),
        ),
        command=f"glassllama bench {walk.name} --prompt 64 --new 16",
        command_shows="tokens per second of the prompt, and of generation one token at a time",
        data={"continuation": [vars(token) | {"piece": walk.piece(token.id)} for token in tokens]},
    )


def greedy_tokens(walk: Walkthrough, cache: KVCache, logits: Tensor) -> list[NextToken]:
    """Generate until the cache is full, one token per forward pass."""
    tokens = [next_token(logits, cache.lengths[0])]
    while cache.lengths[0] < cache.max_len:
        rows = trace(walk.model, [tokens[-1].id], hooks=(), cache=cache).logits
        tokens.append(next_token(rows[0, -1].cpu(), cache.lengths[0]))
    return tokens


def new_token_block(walk: Walkthrough, recorded: Trace) -> Tensors:
    """The chosen layer for the new token alone, with the keys and values of the prompt."""
    return walk.compute_block(
        walk.layer,
        recorded[walk.block_input_hook],
        rope=walk.rope(len(walk.ids), 1),
        past=(rotated(walk)[1], walk.manual["attention.v"]),
    )


def saved(walk: Walkthrough) -> str:
    """Multiplications in products of matrices and vectors, with the cache and without."""
    c, past = walk.config, len(walk.ids)
    attention = 2 * c.dim * c.head_dim * (c.n_heads + walk.n_kv_heads)
    token = c.n_layers * (attention + (3 if walk.is_gated else 2) * c.dim * c.ffn_dim)
    output = c.dim * c.vocab_size
    alone, all_tokens = token + output, (past + 1) * token + output
    return (
        f"This takes {alone / 1e6:,.1f} million multiplications instead of {all_tokens / 1e6:,.1f} "
        "million."
    )


def cache_drawing(walk: Walkthrough, tokens: list[NextToken]) -> Drawing:
    drawn = ["▒ in the cache   █ computed in this forward pass"]
    for token in tokens:
        more = max(token.cached - CACHE_WIDTH, 0)
        skipped = f"…{more} more " if more else ""
        if token is tokens[0]:
            row = "█" * min(token.cached, CACHE_WIDTH)
        else:
            row = "▒" * min(token.cached - 1, CACHE_WIDTH) + "█"
        drawn.append(f"{skipped}{row} → {walk.piece(token.id)}  {token.probability:.0%}")
    return Drawing(tuple(drawn))
