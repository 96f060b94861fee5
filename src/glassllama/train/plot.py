"""The curve of a run as a picture: loss.svg and loss.png, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glassllama.base.errors import MissingExtraError
from glassllama.train.metrics import Record
from glassllama.train.reference_runs import Band

SMOOTH = 50  # steps over which the bold line is a mean


def draw_curve(
    records: Sequence[Record], folder: Path, title: str, band: Band | None = None
) -> list[Path]:
    """Draw training and validation loss over the steps -> the files written into `folder`.

    `band` is drawn behind: where runs like this one usually are. Raises MissingExtraError.
    """
    try:
        import matplotlib.figure as drawing
    except ImportError:
        raise MissingExtraError("loss.svg", "train") from None

    figure = drawing.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = [r.step for r in records], [r.loss for r in records]
    if band is not None:
        axes.fill_between(band.steps, band.low, band.high, color="#dddddd", label="usual")
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.5)
    axes.plot(steps, smoothed(losses), color="#08519c", label="training")
    judged = [(r.step, r.val_loss) for r in records if r.val_loss is not None]
    axes.plot(*zip(*judged, strict=True), "o-", color="#d94801", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    paths = [folder / "loss.svg", folder / "loss.png"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def smoothed(losses: Sequence[float]) -> list[float]:
    """For each step the mean of the last SMOOTH losses, or of as many as there are."""
    return [
        sum(losses[max(0, end - SMOOTH) : end]) / min(SMOOTH, end)
        for end in range(1, len(losses) + 1)
    ]
