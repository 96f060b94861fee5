"""A walkthrough as one plain object: what `--json` prints and other pages are drawn from.

docs/walkthrough.md describes it, field by field. Arrays have no batch axis; large ones are flat,
with their shape beside them. Numbers keep four significant digits: enough for any picture, and the
checks were made before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glassllama.base.interfaces import Progress
from glassllama.walkthrough.all_steps import STEPS, take_step
from glassllama.walkthrough.analysis import (
    Predictions,
    attention_entropy,
    predictions,
    residual_norms,
)
from glassllama.walkthrough.experiment import Experiment
from glassllama.walkthrough.manual_block import PLACES
from glassllama.walkthrough.step import Numbers, Step
from glassllama.walkthrough.text import first_values
from glassllama.walkthrough.trace import Trace, run_with_trace
from glassllama.walkthrough.walk import Walk, open_piece

SCHEMA = "glassllama.walkthrough/1"
DIGITS = 4  # significant ones
PICTURE_WIDTH = 76
FIRST_NUMBERS = 8
CANDIDATES = 256  # likeliest tokens listed with their logits; the rest is a sum
# Where the rest of the vocabulary stands at each temperature that a reader may choose.
TEMPERATURES = [round(0.1 * n, 1) for n in range(1, 21)]

Object = dict[str, Any]


def as_object(
    walk: Walk,
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    experiments: Sequence[Experiment] = (),
    progress: Progress | None = None,
) -> Object:
    """The whole walk. `layers` are shown in full (None: the walk's own), `steps` None: all."""
    numbers = range(len(STEPS)) if steps is None else steps
    taken = []
    for done, number in enumerate(numbers, start=1):
        taken.append(step_object(take_step(walk, number)))
        if progress is not None:
            progress(done, len(numbers))
    return {
        "schema": SCHEMA,
        "model": walk.name,
        "prompt": walk.prompt,
        "layer": walk.layer,
        "head": walk.head,
        "config": config_object(walk),
        "tokens": [token(walk, id) for id in walk.ids],
        "steps": taken,
        "residual_norms": rounded(residual_norms(walk.trace)[:, 0]),
        "attention": attention_object(walk),
        "logit_lens": lens_object(walk),
        "predictions": expected_object(walk, predictions_by_row(walk.logits[0])),
        "probabilities": candidates(walk),
        "angles": array(walk.angles[0]),
        "layers": layer_objects(walk, [walk.layer] if layers is None else layers),
        "experiments": [experiment_object(done) for done in experiments],
    }


def rounded(values: Any) -> Any:
    """Plain numbers, texts, lists and dicts; floats to four significant digits."""
    if isinstance(values, Tensor):
        return rounded(values.tolist())
    if isinstance(values, Mapping):
        return {str(key): rounded(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value) for value in values]
    return float(f"{values:.{DIGITS}g}") if isinstance(values, float) else values


def array(tensor: Tensor) -> Object:
    """A tensor of any shape, flat: the last index runs fastest."""
    return {"shape": list(tensor.shape), "values": rounded(tensor.float().reshape(-1))}


def config_object(walk: Walk) -> Object:
    values = dataclasses.asdict(walk.config)
    values["group_size"] = walk.config.group_size
    if walk.config.rope_scaling is not None:
        values["rope_scaling"]["rule"] = type(walk.config.rope_scaling).__name__
    return values


def token(walk: Walk, id: int) -> Object:
    raw = open_piece(walk.tokenizer, id)
    return {"id": id, "piece": walk.piece(id), "bytes": None if raw is None else list(raw)}


def step_object(step: Step) -> Object:
    return {
        "number": step.number,
        "name": step.name,
        "title": step.title,
        "question": step.question,
        "shapes": step.shapes,
        "sources": [dataclasses.asdict(source) for source in step.sources],
        "text": list(step.text),
        "numbers": [numbers_object(shown) for shown in step.numbers],
        "picture": [line for p in step.pictures for line in [*p.lines(PICTURE_WIDTH), ""]],
        "checks": [dataclasses.asdict(check) for check in step.checks],
        "what_if": dataclasses.asdict(step.what_if),
        "data": rounded(step.data),
    }


def numbers_object(shown: Numbers) -> Object:
    return {
        "name": shown.name,
        "place": shown.place,
        "shape": list(shown.shape),
        "first": rounded(first_values(shown, FIRST_NUMBERS)),
    }


def attention_object(walk: Walk) -> Object:
    """All heads of every layer that was kept: rows of the lower triangle, one after the other."""
    kept = walk.trace.matching("layers.*.attention.weights")
    return {
        "tokens": len(walk.ids),
        "weights": {
            place.split(".")[1]: [triangle(head) for head in w[0]] for place, w in kept.items()
        },
        "entropy_bits": {
            place.split(".")[1]: rounded(attention_entropy(w)[0]) for place, w in kept.items()
        },
    }


def triangle(weights: Tensor) -> list[float]:
    """(T, T) -> what each token gives to itself and those before it, T·(T + 1)/2 numbers."""
    rows, columns = torch.tril_indices(*weights.shape)
    lower: list[float] = rounded(weights[rows, columns])
    return lower


def predictions_by_row(logits: Tensor, k: int = 5) -> Predictions:
    """(T, V) -> (T, k), a row at a time: the whole is large."""
    rows = [predictions(row, k) for row in logits]
    return Predictions(torch.stack([r.ids for r in rows]), torch.stack([r.probs for r in rows]))


def expected_object(walk: Walk, expected: Predictions) -> Object:
    """Predictions (…, k), with the pieces of their ids."""
    ids = expected.ids.tolist()
    return {"ids": ids, "probabilities": rounded(expected.probs), "pieces": pieces(walk, ids)}


def pieces(walk: Walk, ids: Any) -> Any:
    return [pieces(walk, i) for i in ids] if isinstance(ids, list) else walk.piece(ids)


def lens_object(walk: Walk) -> Object:
    """(L + 1, T', k) of the last T' positions."""
    lens = Predictions(walk.lens.ids[:, 0], walk.lens.probs[:, 0])
    first = len(walk.ids) - lens.ids.shape[1]
    return {"first_position": first, **expected_object(walk, lens)}


def candidates(walk: Walk) -> Object:
    """The likeliest next tokens by logit; of all others the log of their summed exp(logit / T)."""
    logits = walk.logits[0, -1].double()
    top = logits.topk(min(CANDIDATES, len(logits)))
    others = torch.ones_like(logits, dtype=torch.bool).index_fill(0, top.indices, False)
    rest = [float((logits[others] / t).logsumexp(0)) for t in TEMPERATURES] if others.any() else []
    ids = top.indices.tolist()
    return {
        "ids": ids,
        "pieces": pieces(walk, ids),
        "logits": [round(value, DIGITS) for value in top.values.tolist()],
        "others": {
            "count": int(others.sum()),
            "temperatures": TEMPERATURES,
            "log_sums": [round(value, DIGITS) for value in rest],
        },
    }


def layer_objects(walk: Walk, layers: Sequence[int]) -> Object:
    """Full tensors of these layers, by place below `layers.N`, with what enters and leaves."""
    others = [n for n in layers if n != walk.layer]
    trace = walk.trace
    if others:
        watch = [f"layers.{n}.*" for n in others]
        trace = Trace({**trace, **run_with_trace(walk.model, walk.ids, watch=watch)[1]})
    return {str(n): layer_object(trace, n) for n in layers}


def layer_object(trace: Trace, n: int) -> Object:
    before = "tok_embeddings" if n == 0 else f"layers.{n - 1}"
    inside = {place: array(trace[f"layers.{n}.{place}"][0]) for place in PLACES.values()}
    return {"input": array(trace[before][0]), **inside, "output": array(trace[f"layers.{n}"][0])}


def experiment_object(done: Experiment) -> Object:
    both = {}
    for name, made in (("right", done.right), ("wrong", done.wrong)):
        both[name] = {
            "predictions": expected_object(done.walk, made.expected),
            "weights": array(made.weights),
            "continuation": {"ids": made.ids, "pieces": pieces(done.walk, made.ids)},
        }
    return {
        "name": done.mistake.name,
        "title": done.mistake.title,
        "explanation": done.mistake.explanation,
        "source": dataclasses.asdict(done.source),
        "divergence_bits": rounded(done.divergence),
        "check": dataclasses.asdict(done.check),
        **both,
    }
