"""Steps 11 to 17: from the feed-forward network to the second token, and what they cost.

Steps 16 and 17 are the costs: the accuracy lost by quantization, the time of every part.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glassllama.base.machine import usable_cores
from glassllama.formats.blocks import (
    BLOCK,
    BLOCKS,
    dequantize,
    pack_q4_0,
    pack_q8_0,
    quantize,
    unpack_q4_0,
    unpack_q8_0,
)
from glassllama.generation.sampler import (
    History,
    Temperature,
    TopP,
    below_largest,
    make_sampler,
    unscaled_probs,
)
from glassllama.models.language_model import LanguageModel
from glassllama.nn.attention import soft_cap
from glassllama.nn.hooks import add_hooks, hook_names
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.norm import RMSNorm, rms_norm
from glassllama.walkthrough.manual_block import GATES, layer_norm
from glassllama.walkthrough.step import Bars, Check, Drawing, Numbers, Step, Table, compare, sources
from glassllama.walkthrough.steps.input import embedding_rows, parameters_in_file
from glassllama.walkthrough.tracing import (
    Intervention,
    kl_divergence,
    predictions,
    residual_norms,
    trace,
)
from glassllama.walkthrough.walkthrough import Walkthrough, shape

SHOWN_FEATURES = 10
NEARLY_CLOSED = 0.05  # |activation| below this: the feature has next to no effect
FAMOUS = "the answer to the ultimate question of life, the universe, and everything is"
FAMOUS_ANSWER = "42"
TOP = 10
ROWS = 8192  # of the output matrix, multiplied at a time: it may be a gigabyte
TEMPERATURE, TOP_P = 0.6, 0.9  # of the example programs that Meta published with Llama 3
SEEDS = 8
TIE = 1e-5  # relative difference of probabilities below which float32 may order ids differently
DEPTH = 2  # sums in sequence: the softmax, and once more over the tokens that top-p keeps
CACHE_WIDTH = 40  # tokens drawn
WeightType = Literal["Q8_0", "Q4_0"]
TYPES: tuple[WeightType, ...] = ("Q8_0", "Q4_0")
QUANTIZED_ROWS = 512  # of a matrix, which may have a quarter of a gigabyte, at a time
# Pattern of hook names -> the part that the time since the hook before it counts for. The first
# match counts. Scores and weights are not among them: hooks there would replace the fused kernel.
PARTS = (
    ("*embeddings", "embedding"),
    ("*norm", "norms"),
    ("layers.*.attention.w[qkvo]", "wq wk wv wo"),
    ("layers.*.attention.?_rope", "RoPE"),
    ("layers.*.attention.heads", "attention"),
    ("layers.*ated", "activation, additions"),  # gated, activated
    ("layers.*.after_attention", "activation, additions"),
    ("layers.*.feed_forward.*", "feed-forward matrices"),
    ("last_logits", "logits"),
)
# Activation of the gate -> its name, that of the network, the formula.
GATED = {
    "silu": ("silu", "SwiGLU", "silu(z) = z / (1 + e^-z)"),
    "gelu_tanh": ("gelu", "GeGLU", "gelu(z) ≈ z·(1 + tanh(0.798·(z + 0.0447·z³)))/2"),
}
Probs = NDArray[np.float64]


def feed_forward(walk: Walkthrough) -> Step:
    c, t, prefix = walk.config, walk.manual, f"{walk.prefix}.feed_forward"
    if walk.block is not None:
        kind = walk.block.feed_forward.activation
        names: tuple[str, ...] = ("gate", "up", "gated", "down")
        activation = GATES[kind](t["feed_forward.gate"])[0, -1].float()  # (F,)
        gate, title, formula = GATED[kind]
        title, label = f"{title} feed-forward network", f"{gate}(gate)·up"
        text = (
            f"up computes the features, and each is multiplied by its gate, {gate}(gate), where "
            f"{formula} is near 0 for negative z and near z for positive z."
        )
    else:
        names, kind = ("up", "activated", "down"), c.activation
        activation, label = t["feed_forward.activated"][0, -1].float(), f"{c.activation}(up)"
        title = f"Feed-forward network with {c.activation.split('_')[0].upper()}"
        text = f"up computes the features and {c.activation} is applied to each: " + (
            "it sets negative numbers to 0."
            if c.activation == "relu"
            else "its result is near 0 for negative inputs and near the input for positive ones."
        )
    closed = float((activation.abs() < NEARLY_CLOSED).float().mean())
    hooks = {name: f"feed_forward.{name}" for name in names}
    features, down = t[hooks[names[-2]]], t["feed_forward.down"]
    before, after = ([n for n in walk.norms if n == kind] for kind in ("ffn_norm", "post_ffn_norm"))
    all_hooks = [*before, *hooks.values(), *after]
    return Step(
        name="feed_forward" if walk.block is None else "swiglu",
        title=title,
        question="What does the feed-forward network add to the residual stream?",
        shapes=f"{(before or ['x'])[0]} {shape(down)} → {label} {shape(features)} → {shape(down)}",
        sources=walk.calls(prefix, names[-2], "down") + walk.calls(walk.prefix, "feed_forward"),
        text=f"{c.ffn_dim:,} features for each token. {text} For the last token {closed:.0%} of "
        "the activations are nearly 0. down maps the features to a vector that is "
        f"{walk.before_adding(*after)}added to the residual stream.",
        numbers=walk.numbers({hook.removeprefix("feed_forward."): hook for hook in all_hooks}),
        pictures=[largest_features(walk, features[0, -1])],
        checks=[*walk.checks(*all_hooks), walk.check(walk.prefix, t["output"])],
        command=walk.command(f"--step 11 --layer {c.n_layers - 1}"),
        command_shows="in the last layer other features are active, and a few are very large",
        data={"nearly_closed": closed, "activation": kind},
    )


def largest_features(walk: Walkthrough, features: Tensor) -> Bars:
    """The features (F,) of the last token with the largest sizes."""
    largest = features.float().abs().topk(min(SHOWN_FEATURES, len(features)))
    rows = []
    for size, n in zip(*map(Tensor.tolist, largest), strict=True):
        names = ("gate", "up") if walk.block is not None else ("up",)
        parts = [f"{float(walk.manual[f'feed_forward.{p}'][0, -1, n]):8.3f} {p}" for p in names]
        rows.append((f"feature {n}", size, " ".join([*parts, f"{float(features[n]):9.3f}"])))
    return Bars("the largest features of the last token", rows)


def check_all_layers(walk: Walkthrough) -> Check:
    """Every layer computed from the embeddings on, weights read from the file: the worst check."""
    *_, x = embedding_rows(walk).values()  # the input of the first layer: (1, T, C)
    checks = []
    for n in range(walk.config.n_layers):
        name = f"layers.{n}"
        fused = f"{name}.attention.weights" not in walk.trace  # as in the traced run
        x = walk.compute_block(n, x, walk.positions, fused=fused)["output"]
        checks.append(walk.compare_runs(name, x, walk.trace[name]))
    worst = max(checks, key=lambda check: check.relative)
    return replace(worst, what=f"layers.0 … layers.{walk.config.n_layers - 1}")


def all_layers(walk: Walkthrough) -> Step:
    x, count = shape(walk.block_input), walk.config.n_layers
    norms = residual_norms(walk.trace)[:, 0]  # (L + 1, T)
    ids, probs = (found[:, 0, -1, 0].tolist() for found in walk.lens)  # (L + 1,) of the last token
    labels = ["embedding", *(f"layer {n}" for n in range(count))]
    rows = [
        (label, norm, f"{norm:9.2f}  {f'{p:4.0%} {walk.piece(i)[:14]}':<19}")
        for label, norm, i, p in zip(labels, norms[:, -1].tolist(), ids, probs, strict=True)
    ]
    title = "L2 norm of the last token's vector, and the prediction of the logit lens"
    return Step(
        name="layers",
        title="All layers",
        question="How does the residual stream change from layer to layer?",
        shapes=f"x {x} → {count} layers → {x}",
        sources=sources(
            (walk.implementation("layers.0").forward,),
            (walk.implementation().hidden, "for ", "x = layer"),
        ),
        text="Every layer adds to the residual stream. The logit lens applies the last norm and "
        "the output matrix to the residual stream between layers, and shows the most probable "
        "token there. For the check all layers were computed once more, from the embeddings.",
        pictures=[Bars(title, rows)],
        checks=[check_all_layers(walk)],
        command=walk.command("--step 12"),
        command_shows="another last word in the prompt: from which layer on does the lens differ?",
        data={"residual_norms": norms},
    )


def manual_last_norm(walk: Walkthrough) -> Tensor:
    x, eps = walk.trace[f"layers.{walk.config.n_layers - 1}"], walk.config.norm_eps
    weight = walk.parameter("norm.weight")
    if walk.is_rms_norm:
        return rms_norm(x, eps) * weight  # (1, T, C)
    return layer_norm(x, weight, walk.parameter("norm.bias") if walk.config.bias else None, eps)


def manual_logits(walk: Walkthrough, normed: Tensor) -> Tensor:
    """(1, T, C) -> (1, T, V) float32; a block of rows of the output matrix at a time."""
    c = walk.config
    name = "tok_embeddings.weight" if c.tie_embeddings else "output.weight"
    blocks = []
    for start in range(0, c.vocab_size, ROWS):
        rows = walk.checkpoint.float32(name, slice(start, min(start + ROWS, c.vocab_size)))
        blocks.append(F.linear(normed, torch.from_numpy(rows).to(normed.dtype)).float())
        walk.checkpoint.release_pages(name)
    logits = torch.cat(blocks, dim=-1)
    if walk.plan is None:
        return logits
    logits *= walk.plan.logit_multiplier
    return soft_cap(logits, walk.plan.logit_softcap) if walk.plan.logit_softcap else logits


def logit_changes(walk: Walkthrough) -> str:
    """What happens to the products before they are logits, if anything."""
    parts, plan = [], walk.plan
    if plan is not None and plan.logit_multiplier != 1:
        parts.append(f" They are divided by {1 / plan.logit_multiplier:g}.")
    if plan is not None and (cap := plan.logit_softcap):
        parts.append(f" A soft cap, {cap:g} · tanh(logit / {cap:g}), keeps them within ±{cap:g}.")
    return "".join(parts)


def last_logits(walk: Walkthrough) -> Step:
    c = walk.config
    normed = manual_last_norm(walk)
    logits = manual_logits(walk, normed)
    last = logits[0, -1]
    top = [*zip(*map(Tensor.tolist, predictions(last, TOP)), strict=True)]
    rows = [(walk.piece(i), p, f"{p:6.1%}  logit {float(last[i]):7.3f}") for i, p in top]
    matrix = "the embedding matrix, used again" if c.tie_embeddings else "the output matrix"
    statement = "return F.linear" if c.tie_embeddings else "product: Tensor = self.output"
    return Step(
        name="logits",
        title="Last norm, logits, top ten",
        question="How does the last vector become a probability for every token?",
        shapes=f"x {shape(normed)} → norm {shape(normed)} → logits {shape(logits)}",
        sources=sources(
            (RMSNorm.forward, "return") if walk.is_rms_norm else (layer_norm,),
            (walk.implementation().multiply_output, statement),
            *([(walk.implementation().cap_logits,)] if logit_changes(walk) else []),
        ),
        text=f"The logits are the products of the vector with the {c.vocab_size:,} rows of "
        f"{matrix}.{logit_changes(walk)} Softmax makes them probabilities. The model predicts the "
        "next token after every position; only the last prediction continues the text."
        f"{famous(walk, top[0][0])}",
        numbers=[
            Numbers("norm, last token", normed[0, -1], "norm"),
            Numbers("logits, last token", last, "last_logits"),
        ],
        pictures=[Bars("the most probable next tokens", rows, top=1.0), prediction_table(walk)],
        checks=[
            walk.check("norm", normed),
            walk.check("last_logits", logits),
            walk.compare_runs("logits of a run without hooks", logits, walk.plain_logits),
        ],
        command=walk.command("--step 13"),
        command_shows="add a word to the prompt: the table shows which probability it had",
        data={"top": [{"id": i, "piece": walk.piece(i), "probability": p} for i, p in top]},
    )


def famous(walk: Walkthrough, top: int) -> str:
    """For a prompt of many tutorials: the answer of a larger model, if this one has another."""
    if (walk.prompt or "").strip().lower() != FAMOUS or FAMOUS_ANSWER.startswith(walk.piece(top)):
        return ""
    millions = f"{parameters_in_file(walk.checkpoint) / 1e6:,.0f} million parameters"
    return (
        f"\nWith {millions} this model does not know the book that the prompt is from. For "
        f"Llama-3-8B the most probable token is {FAMOUS_ANSWER}, before 6, 43 and 41."
    )


def prediction_table(walk: Walkthrough) -> Table:
    """The prediction after every position, and the probability of the token that follows."""
    best, rows = walk.predictions, []
    for n in walk.shown:
        probs = walk.logits[0, n].softmax(-1)  # (V,)
        following = "" if n + 1 == len(walk.ids) else f"{float(probs[walk.ids[n + 1]]):.1%}"
        predicted, p = walk.piece(int(best.ids[n, 0])), float(best.probs[n, 0])
        rows.append((n, walk.pieces[n], predicted, f"{p:.1%}", following))
    columns = ["position>", "token", "prediction", "probability>", "of the following token>"]
    return Table(columns, rows)


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
        sources=sources(
            (Temperature.__call__, "out:"),
            (below_largest, "out:"),
            (TopP.__call__, "ordered", "threshold", "return keep"),
        ),
        text=f"Logits are divided by the temperature {TEMPERATURE}, which makes probable tokens "
        "more probable. Top-p keeps the most probable tokens with a total probability of "
        f"{TOP_P:.0%}: here {len(nucleus)} of {len(logits):,}. A random number selects one of "
        f"them. Seeds 0 to {SEEDS - 1}: {', '.join(walk.piece(id) for id in drawn)}.",
        pictures=[candidate_bars(walk, plain, scaled, nucleus)],
        checks=[compare("probabilities of the sampler", *both, terms=len(logits), depth=DEPTH)],
        command="glassllama generate PROMPT -n 20 --temperature 1.5 --top-p 1",
        command_shows="a higher temperature without top-p: improbable tokens are sampled",
        data={"temperature": TEMPERATURE, "top_p": TOP_P, "nucleus": nucleus.tolist(),
              "draws": drawn},
    )  # fmt: skip


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
    rows, inside = [], set(nucleus.tolist())
    for i in np.argsort(-plain, kind="stable")[:TOP].tolist():
        removed = "" if i in inside else "removed"
        note = f"{plain[i]:6.1%} → {scaled[i]:6.1%} {removed:<7}"
        rows.append((walk.piece(i), float(scaled[i]), note))
    title = f"probability → at temperature {TEMPERATURE}; removed: by top-p {TOP_P}"
    return Bars(title, rows, top=1.0)


def next_token(walk: Walkthrough, logits: Tensor, cached: int) -> dict[str, Any]:
    """The greedy token, and the number of tokens in the cache before it."""
    best = predictions(logits)
    id, p = int(best.ids[0]), float(best.probs[0])
    return {"id": id, "probability": p, "cached": cached, "piece": walk.piece(id)}


def kv_cache(walk: Walkthrough) -> Step:
    past, prefix, cache = len(walk.ids), walk.prefix, walk.cache
    cache.truncate(0, past)  # this step may have added tokens before
    first = next_token(walk, walk.logits[0, -1], past)
    hooks = ("*embeddings", "layers.*", "last_logits")
    recorded = trace(walk.model, [first["id"]], hooks=hooks, cache=cache)
    again = trace(walk.model, [*walk.ids, first["id"]], hooks=()).logits[:, -1:]
    # The chosen layer for the new token alone, with the keys and values of the prompt.
    known = (walk.rotated[1], walk.manual["attention.v"])
    x, position = recorded[walk.block_input_hook], range(past, past + 1)
    manual = walk.compute_block(walk.layer, x, position, known)
    tokens, last = [first], recorded
    while True:  # generate until the cache is full, one token per forward pass
        tokens.append(next_token(walk, last.logits[0, -1].cpu(), cache.lengths[0]))
        if cache.lengths[0] == cache.max_len:
            break
        last = trace(walk.model, [tokens[-1]["id"]], hooks=(), cache=cache)
    hook, logits = f"{prefix}.attention.weights", recorded.logits.cpu()
    label = f"weights of the new token, head {walk.head}"
    forward, window = walk.implementation(f"{prefix}.attention").forward, ""
    if walk.attention.window is not None:
        window = f" With its window of {walk.attention.window:,} tokens this layer uses only the "
        window += f"last {walk.attention.window - 1:,} cached keys and values."
    return Step(
        name="cache",
        title="The second token, with the KV cache",
        question="Which results are reused for the next token?",
        shapes=f"1 new id, {past} cached keys and values → logits {shape(logits)}",
        sources=sources(
            (forward, "if context.cache", "k, v = context.cache"),
            (KVCache.extend, "cached[:, :, self.lengths"),
        ),
        text=f"{first['piece']} is appended and is the only input of this forward pass. The "
        f"causal mask hides it from the {past} tokens before it, so their tensors do not change: "
        "their keys and values are in the KV cache, and their queries, feed-forward features and "
        f"logits are not needed again. {saved(walk)}{window}",
        numbers=[Numbers(label, recorded[hook][0, walk.head, -1])],
        pictures=[cache_drawing(tokens)],
        checks=[
            walk.compare(f"{hook} of the new token", manual["attention.weights"], recorded[hook]),
            walk.compare(f"{prefix} of the new token", manual["output"], recorded[prefix]),
            walk.compare_runs("logits without a cache", logits, again.cpu()),
        ],
        command=f"glassllama bench {walk.name} --prompt 64 --new 16",
        command_shows="tokens per second of the prompt, and of generation one token at a time",
        data={"continuation": tokens},
    )


def saved(walk: Walkthrough) -> str:
    """Multiplications in products of matrices and vectors, with the cache and without."""
    c, past = walk.config, len(walk.ids)
    attention = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
    token = c.n_layers * (attention + (2 if walk.block is None else 3) * c.dim * c.ffn_dim)
    output = c.dim * c.vocab_size
    alone, all_tokens = (f"{(n * token + output) / 1e6:,.1f}" for n in (1, past + 1))
    return f"This takes {alone} million multiplications instead of {all_tokens} million."


def cache_drawing(tokens: list[dict[str, Any]]) -> Drawing:
    drawn = ["▒ in the cache   █ computed in this forward pass"]
    for token in tokens:
        cached = token["cached"]
        skipped = f"…{cached - CACHE_WIDTH} more " if cached > CACHE_WIDTH else ""
        row = "▒" * min(cached - 1, CACHE_WIDTH) + "█"
        if token is tokens[0]:
            row = "█" * min(cached, CACHE_WIDTH)
        drawn.append(f"{skipped}{row} → {token['piece']}  {token['probability']:.0%}")
    return Drawing(drawn)


@dataclass(frozen=True)
class QuantizationError:
    """Effect of one quantized matrix; errors of weights and output are relative L2 norms."""

    type: WeightType
    bits: float
    weights: float
    output: float
    logits: float  # the largest change of any logit after the last token
    divergence: float  # bits, of the next token's distribution (Kullback-Leibler)
    predicts: int


def quantization(walk: Walkthrough) -> Step:
    name = f"{walk.prefix}.feed_forward.down"
    matrix, stored = walk.parameter(f"{name}.weight"), walk.checkpoint.info(f"{name}.weight").dtype
    unchanged = logits_with_output(walk, down_output(walk, matrix))
    results = [quantization_error(walk, weight_type, matrix) for weight_type in TYPES]
    columns = ("stored as", "bits>", "error of weights>", "of output>", "largest logit change>",
               "KL bits>", "predicts")  # fmt: skip
    rows = [
        (e.type, f"{e.bits:.1f}", f"{e.weights:.3%}", f"{e.output:.3%}", f"{e.logits:.4f}",
         f"{e.divergence:.2e}", walk.piece(e.predicts)) for e in results
    ]  # fmt: skip
    what = "logits with the same matrix, unchanged"
    return Step(
        name="quantization",
        title="Quantization: the same with fewer bits",
        question="How much do Q8_0 and Q4_0 change weights, outputs and logits?",
        shapes=f"down {shape(matrix)}, stored as {stored} → blocks of 32 → {shape(matrix)}",
        sources=sources(
            (pack_q8_0, "scale =", "codes ="),
            (unpack_q8_0,),
            (pack_q4_0, "codes ="),
            (unpack_q4_0, "out -=", "out *="),
        ),
        text=f"Only the matrix {name} is quantized: 32 numbers have a common scale, and each is a "
        "small integer. The model runs again with the dequantized matrix.",
        pictures=[Table(columns, rows)],
        checks=[walk.compare_runs(what, unchanged, walk.plain_logits)],
        command=walk.command(f"--step 16 --layer {walk.config.n_layers - 1}"),
        command_shows="the error of a matrix in the last layer passes through no other layers",
        data={"matrix": name, "stored": stored, "types": [*map(asdict, results)]},
    )


def quantization_error(
    walk: Walkthrough, weight_type: WeightType, matrix: Tensor
) -> QuantizationError:
    """Run the model with the chosen layer's `down` quantized and dequantized."""
    quantized = round_trip(matrix, weight_type)
    weights, output = relative_error(quantized, matrix), down_output(walk, quantized)
    del quantized  # the model run needs memory as well
    logits = logits_with_output(walk, output)[0, -1]
    correct = walk.plain_logits[0, -1]
    return QuantizationError(
        type=weight_type,
        bits=8 * BLOCKS[weight_type].record.itemsize / BLOCK,
        weights=weights,
        output=relative_error(output, walk.trace[f"{walk.prefix}.feed_forward.down"]),
        logits=float((logits - correct).abs().max()),
        divergence=kl_divergence(correct, logits),
        predicts=int(predictions(logits).ids[0]),
    )


def round_trip(matrix: Tensor, weight_type: WeightType) -> Tensor:
    """The matrix quantized and dequantized; rows are padded to whole blocks."""
    columns, result = matrix.shape[1], torch.empty_like(matrix)
    for out, rows in zip(
        torch.split(result, QUANTIZED_ROWS), torch.split(matrix, QUANTIZED_ROWS), strict=True
    ):
        padded = F.pad(rows.float(), (0, -columns % BLOCK)).numpy()
        unpacked = dequantize(quantize(padded, weight_type), weight_type, padded.shape)
        out.copy_(torch.from_numpy(unpacked)[:, :columns])
    return result


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """L2 norm of the difference, divided by that of the exact matrix."""
    pairs = zip(
        torch.split(approximate, QUANTIZED_ROWS), torch.split(exact, QUANTIZED_ROWS), strict=True
    )
    differences = torch.stack([(a.float() - b.float()).norm() for a, b in pairs])
    norms = torch.stack([b.float().norm() for b in torch.split(exact, QUANTIZED_ROWS)])
    return float(differences.norm() / norms.norm().clamp(min=1e-30))


def down_output(walk: Walkthrough, matrix: Tensor) -> Tensor:
    """The output of the chosen layer's `down` with this matrix: (1, T, C)."""
    features = "gated" if walk.block is not None else "activated"
    x = walk.trace[f"{walk.prefix}.feed_forward.{features}"]
    return F.linear(x, matrix, walk.bias("feed_forward.down"))


def logits_with_output(walk: Walkthrough, output: Tensor) -> Tensor:
    """Logits (1, T, V) of a run in which the chosen layer's `down` has this output."""
    replaced = Intervention(f"{walk.prefix}.feed_forward.down", lambda out: output.to(out))
    return trace(walk.model, walk.ids, hooks=(), interventions=[replaced]).logits.cpu()


@torch.no_grad()
def seconds_by_part(model: LanguageModel, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Run the model on (B, T) ids -> its logits, and the seconds of each part in all layers."""
    hooks = [(name, part_of(name)) for name in hook_names(model)]
    parts = {name: part for name, part in hooks if part is not None}
    seconds = {part: 0.0 for _, part in PARTS if part in parts.values()}
    last = 0.0

    def end(name: str, _out: Tensor) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[parts[name]] += now - last
        last = now

    with add_hooks(model, [(name, end) for name in parts]):
        last = time.perf_counter()
        logits = model(ids)
    return logits, seconds


def part_of(hook: str) -> str | None:
    return next((part for pattern, part in PARTS if fnmatchcase(hook, pattern)), None)


def time_by_part(walk: Walkthrough) -> Step:
    logits, seconds = seconds_by_part(walk.model, walk.id_tensor)
    total = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    rows = [(part, s, f"{s * 1e3:8.1f} ms {s / total:4.0%}") for part, s in parts]
    threads, cores = torch.get_num_threads(), usable_cores()
    return Step(
        name="time",
        title="Time by part",
        question="Which parts of the forward pass take how much time?",
        shapes=f"ids (1, {len(walk.ids)}) → logits {shape(logits)} in {total:.3f} s",
        sources=sources((walk.implementation().hidden, "for ", "x = layer", "return")),
        text=f"One forward pass of the prompt in PyTorch, {threads} threads on {cores} cores: "
        f"{len(walk.ids) / total:,.0f} tokens per second. Products with weight matrices take most "
        "of the time; attention itself takes little for a short text.",
        pictures=[Bars("seconds", rows)],
        checks=[walk.compare_runs("logits of the timed run", logits.cpu(), walk.plain_logits)],
        command=f"glassllama bench {walk.name}",
        command_shows="the speed of the same model in the engine, which keeps weights quantized",
        data={"seconds": seconds, "threads": threads},
    )


STEPS = (
    feed_forward, all_layers, last_logits, sampling, kv_cache, quantization, time_by_part
)  # fmt: skip
