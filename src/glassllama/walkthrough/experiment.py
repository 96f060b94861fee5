"""What breaks if …: the same prompt through a model with one mistake, beside the right one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from glassllama.walkthrough.analysis import Predictions, predictions
from glassllama.walkthrough.interventions import Mistake, mistaken
from glassllama.walkthrough.pictures import HeatMap, Picture, Table
from glassllama.walkthrough.step import Check, Source, source
from glassllama.walkthrough.steps.quantization import divergence
from glassllama.walkthrough.text import MARGIN, Page, check_lines, heading, source_lines
from glassllama.walkthrough.trace import run_with_trace
from glassllama.walkthrough.walk import Walk

TOP = 10
WRITTEN = 16  # tokens that either model goes on to write


@dataclass(frozen=True)
class Run:
    """What one of the two models makes of the prompt."""

    expected: Predictions  # (T, 10)
    weights: Tensor  # of the chosen head, (T, T)
    logits: Tensor  # (T, V)
    ids: list[int]  # what it writes, always the likeliest


@dataclass(frozen=True)
class Experiment:
    """The right model and the mistaken one on the same prompt."""

    walk: Walk
    mistake: Mistake
    source: Source
    right: Run
    wrong: Run
    divergence: list[float]  # bits, after each position
    check: Check  # that the mistake is gone afterwards


def experiment(walk: Walk, mistake: Mistake) -> Experiment:
    """Run both. Raises StepMismatchError if the model is not as it was before."""
    right = run(walk, nullcontext())
    wrong = run(walk, mistaken(walk.model, mistake))
    with torch.no_grad():
        after: Tensor = walk.model(walk.id_tensor).cpu()
    pairs = zip(right.logits, wrong.logits, strict=True)
    return Experiment(
        walk=walk,
        mistake=mistake,
        source=source(mistake.make),
        right=right,
        wrong=wrong,
        divergence=[divergence(*pair) for pair in pairs],
        check=walk.compare_runs("the right model again, afterwards", after, walk.plain_logits),
    )


def run(walk: Walk, state: AbstractContextManager[None]) -> Run:
    """The prompt, and what is written after it, while the model is in this state."""
    place = f"{walk.prefix}.attention.weights"
    room = min(len(walk.ids) + WRITTEN, walk.config.max_seq_len)
    cache = walk.model.new_cache(1, room)
    with state:
        logits, trace = run_with_trace(walk.model, walk.ids, watch=[place], cache=cache)
        written = [int(logits[0, -1].argmax())]
        while cache.lengths[0] < room - 1:
            rows, _ = run_with_trace(walk.model, written[-1:], watch=(), cache=cache)
            written.append(int(rows[0, -1].argmax()))
    rows = logits[0].cpu()
    best = [predictions(row, TOP) for row in rows]
    expected = Predictions(torch.stack([b.ids for b in best]), torch.stack([b.probs for b in best]))
    return Run(expected, trace[place][0, walk.head], rows, written)


def render_experiment(done: Experiment, page: Page) -> str:
    return "\n".join(lines(done, page)) + "\n"


def lines(done: Experiment, page: Page) -> Iterator[str]:
    walk, width = done.walk, page.width - 2 * len(MARGIN)
    yield heading(f"What breaks if … {done.mistake.title}", page)
    yield from page.wrap(done.mistake.explanation)
    yield ""
    yield from source_lines(done.source, page)
    for picture in pictures(done):
        yield ""
        yield from (MARGIN + line for line in picture.lines(width))
    yield ""
    for name, written in (("right", done.right), ("wrong", done.wrong)):
        yield from page.wrap(f"{name} goes on:  " + "".join(walk.piece(id) for id in written.ids))
    yield ""
    yield from check_lines((done.check,), page)


def pictures(done: Experiment) -> tuple[Picture, ...]:
    return position_table(done), top_table(done), *maps(done)


def position_table(done: Experiment) -> Table:
    walk, rows = done.walk, []
    for n in walk.shown:
        cells = [best(walk, made.expected, n) for made in (done.right, done.wrong)]
        rows.append((n, walk.pieces[n], *cells, f"{done.divergence[n]:.2f}"))
    return Table(["position>", "token", "right expects", "wrong expects", "bits apart>"], rows)


def best(walk: Walk, expected: Predictions, row: int, rank: int = 0) -> str:
    return f"{float(expected.probs[row, rank]):4.0%} {walk.piece(int(expected.ids[row, rank]))}"


def top_table(done: Experiment) -> Table:
    pairs = (done.right.expected, done.wrong.expected)
    rows = [
        (n + 1, *(best(done.walk, made, -1, n) for made in pairs))
        for n in range(pairs[0].ids.shape[-1])
    ]
    return Table(["rank>", "right", "wrong"], rows, title="the likeliest next tokens")


def maps(done: Experiment) -> Iterator[HeatMap]:
    walk = done.walk
    where = f"layer {walk.layer}, head {walk.head}"
    for name, made in (("right", done.right), ("wrong", done.wrong)):
        yield HeatMap(f"{name}: {where}", made.weights.float().numpy(), walk.pieces, top=1.0)
