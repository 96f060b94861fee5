"""A walkthrough as one object of plain values: printed by `--json`, and the data of the HTML page.

docs/walkthrough.md describes every field. Arrays have no batch axis; large ones are flat, with
their shape. Numbers have four significant digits, enough for any picture; the checks use all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glassllama.base.interfaces import Progress
from glassllama.walkthrough.analysis import Predictions, attention_entropy, residual_norms
from glassllama.walkthrough.mistakes import Comparison
from glassllama.walkthrough.step import Numbers, Step
from glassllama.walkthrough.steps import STEPS, run_step
from glassllama.walkthrough.tracing import trace
from glassllama.walkthrough.walkthrough import Walkthrough, bytes_of_token

SCHEMA = "glassllama.walkthrough/2"
DIGITS = 4  # significant
PICTURE_WIDTH = 76
FIRST_NUMBERS = 8
CANDIDATES = 256  # the most probable tokens, listed with their logits; of the others only a sum
TEMPERATURES = [round(0.1 * n, 1) for n in range(1, 21)]  # for which this sum is computed

Object = dict[str, Any]


def to_json(
    walk: Walkthrough,
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    mistakes: Sequence[Comparison] = (),
    progress: Progress | None = None,
) -> Object:
    """The walkthrough as an object. All tensors of `layers` are in it (None: of the chosen one).

    `steps` None: all steps. `progress` counts them.
    """
    numbers = range(len(STEPS)) if steps is None else steps
    done = []
    for count, number in enumerate(numbers, start=1):
        done.append(step_to_json(run_step(walk, number)))
        if progress is not None:
            progress(count, len(numbers))
    return {
        "schema": SCHEMA,
        "model": walk.name,
        "prompt": walk.prompt,
        "layer": walk.layer,
        "head": walk.head,
        "config": config_to_json(walk),
        "tokens": [token_to_json(walk, id) for id in walk.ids],
        "steps": done,
        "residual_norms": plain(residual_norms(walk.trace)[:, 0]),
        "attention": attention_to_json(walk),
        "logit_lens": lens_to_json(walk),
        "predictions": predictions_to_json(walk, walk.predictions),
        "probabilities": candidates_to_json(walk),
        "angles": None if walk.angles is None else array(walk.angles[0]),
        "layers": layers_to_json(walk, [walk.layer] if layers is None else layers),
        "mistakes": [comparison_to_json(each) for each in mistakes],
    }


def plain(values: Any) -> Any:
    """Numbers, texts, lists and dicts; floats with four significant digits."""
    if isinstance(values, Tensor):
        return plain(values.tolist())
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    return float(f"{values:.{DIGITS}g}") if isinstance(values, float) else values


def array(tensor: Tensor) -> Object:
    """A tensor of any shape, flat: the last index changes fastest."""
    return {"shape": list(tensor.shape), "values": plain(tensor.float().reshape(-1))}


def config_to_json(walk: Walkthrough) -> Object:
    values = dataclasses.asdict(walk.config)
    if values.get("rope_scaling") is not None:
        values["rope_scaling"]["rule"] = type(walk.config.rope_scaling).__name__
    derived = {"n_kv_heads": walk.n_kv_heads, "group_size": walk.group_size}
    return {**values, **derived, "head_dim": walk.config.head_dim}


def token_to_json(walk: Walkthrough, id: int) -> Object:
    raw = bytes_of_token(walk.tokenizer, id)
    return {"id": id, "piece": walk.piece(id), "bytes": None if raw is None else list(raw)}


def step_to_json(step: Step) -> Object:
    texts = ("number", "name", "title", "question", "shapes")
    return {
        **{name: getattr(step, name) for name in texts},
        "sources": [dataclasses.asdict(source) for source in step.sources],
        "text": list(step.text),
        "numbers": [numbers_to_json(shown) for shown in step.numbers],
        "picture": [line for p in step.pictures for line in [*p.lines(PICTURE_WIDTH), ""]],
        "checks": [dataclasses.asdict(check) for check in step.checks],
        "what_if": {"command": step.command, "shows": step.command_shows},
        "data": plain(step.data),
    }


def numbers_to_json(shown: Numbers) -> Object:
    first = plain(shown.first(FIRST_NUMBERS))
    return {"name": shown.name, "hook": shown.hook, "shape": list(shown.shape), "first": first}


def attention_to_json(walk: Walkthrough) -> Object:
    """All heads of every recorded layer: rows of the lower triangle, one after the other."""
    weights = {
        name.split(".")[1]: tensor
        for name, tensor in walk.trace.matching("layers.*.attention.weights").items()
    }
    return {
        "tokens": len(walk.ids),
        "weights": {n: [lower_triangle(head) for head in w[0]] for n, w in weights.items()},
        "entropy_bits": {n: plain(attention_entropy(w)[0]) for n, w in weights.items()},
    }


def lower_triangle(weights: Tensor) -> list[float]:
    """(T, T) -> the weights on a token itself and on those before it, T·(T + 1)/2 numbers."""
    rows, columns = torch.tril_indices(*weights.shape)
    lower: list[float] = plain(weights[rows, columns])
    return lower


def predictions_to_json(walk: Walkthrough, predicted: Predictions) -> Object:
    """Predictions (…, k), with the pieces of their ids."""
    ids = predicted.ids.tolist()
    return {"ids": ids, "probabilities": plain(predicted.probs), "pieces": pieces(walk, ids)}


def pieces(walk: Walkthrough, ids: Any) -> Any:
    return [pieces(walk, i) for i in ids] if isinstance(ids, list) else walk.piece(ids)


def lens_to_json(walk: Walkthrough) -> Object:
    """(L + 1, T', k) of the last T' positions."""
    lens = Predictions(walk.lens.ids[:, 0], walk.lens.probs[:, 0])
    first = len(walk.ids) - lens.ids.shape[1]
    return {"first_position": first, **predictions_to_json(walk, lens)}


def candidates_to_json(walk: Walkthrough) -> Object:
    """The most probable next tokens with their logits; of all others log Σ exp(logit / T)."""
    logits = walk.logits[0, -1].double()
    top = logits.topk(min(CANDIDATES, len(logits)))
    others = torch.ones_like(logits, dtype=torch.bool).index_fill(0, top.indices, False)
    sums = [float((logits[others] / t).logsumexp(0)) for t in TEMPERATURES] if others.any() else []
    ids = top.indices.tolist()
    return {
        "ids": ids,
        "pieces": pieces(walk, ids),
        "logits": [round(value, DIGITS) for value in top.values.tolist()],
        "others": {
            "count": int(others.sum()),
            "temperatures": TEMPERATURES,
            "log_sums": [round(value, DIGITS) for value in sums],
        },
    }


def layers_to_json(walk: Walkthrough, layers: Sequence[int]) -> Object:
    """All tensors of these layers by hook name below `layers.N`, with input and output."""
    others = [f"layers.{n}.*" for n in layers if n != walk.layer]
    tensors: Mapping[str, Tensor] = walk.trace
    if others:
        tensors = {**tensors, **trace(walk.model, walk.ids, hooks=others)}
    return {str(n): layer_to_json(dataclasses.replace(walk, layer=n), tensors) for n in layers}


def layer_to_json(walk: Walkthrough, tensors: Mapping[str, Tensor]) -> Object:
    names = {"input": walk.block_input_hook}
    names |= {name: f"{walk.prefix}.{name}" for name in walk.block_hooks}
    names["output"] = walk.prefix
    return {name: array(tensors[hook][0]) for name, hook in names.items()}


def comparison_to_json(done: Comparison) -> Object:
    walk = done.walkthrough
    runs = {
        name: {
            "predictions": predictions_to_json(walk, run.predictions),
            "weights": array(run.weights),
            "continuation": {"ids": run.continuation, "pieces": pieces(walk, run.continuation)},
        }
        for name, run in done.runs.items()
    }
    return {
        "name": done.mistake.name,
        "title": done.mistake.title,
        "explanation": done.mistake.explanation,
        "source": dataclasses.asdict(done.source),
        "divergence_bits": plain(done.divergence),
        "check": dataclasses.asdict(done.check),
        **runs,
    }
