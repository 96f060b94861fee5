"""What is seen of a training run: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from glassllama.cli.console import console, is_terminal, note

if TYPE_CHECKING:
    from rich.live import Live

    from glassllama.train.metrics import Record
    from glassllama.train.reference_runs import Watchman

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # of the curve of characters
LINES = 20  # plain lines in a whole run, besides evaluations
REFRESH = 4  # times a second
LEAST = 1.0  # seconds over which a speed is measured where every step is shown


@dataclass
class View:
    """Told of every step (train/loop.py's Listener), shows what a person wants to know of it.

    `peak` and `flops` (of one token) give MFU: the share of the machine's arithmetic that is used.
    """

    steps: int  # of the whole run
    first: int  # steps made before this process
    flops: float
    peak: float
    watchman: Watchman | None = None
    losses: list[float] = field(default_factory=list)
    judged: str = ""
    _rate: float = 0.0  # tokens a second, when last measured
    _marked: Record | None = None  # the step after which that was
    _live: Live | None = None
    _started: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> View:
        if is_terminal(sys.stderr):
            from rich.live import Live

            self._live = Live(console=console("stderr"), refresh_per_second=REFRESH, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_step(self, record: Record) -> None:
        self.losses.append(record.loss)
        if record.val_loss is not None:
            self.judged = f"validation {record.val_loss:.4f} ± {record.val_error:.4f}"
            per_byte = f"{record.bits_per_byte:.3f} bits a byte"
            self.say(f"step {record.step:,}: {self.judged}, {per_byte}")
        warning = self.watchman and self.watchman.hear(record.step, record.loss)
        if warning:
            self.say(warning)
        if self._live is not None:
            from rich.text import Text

            self.measure(record, least=LEAST)
            lines = (self.line(record), self.judged, curve(self.losses, WIDTH))
            self._live.update(Text("\n".join(line for line in lines if line)))
        elif record.step % max(1, self.steps // LINES) == 0:
            self.measure(record)
            note(self.line(record))

    def on_sample(self, step: int, text: str) -> None:
        self.say(f"step {step:,}, a sample:\n{text}\n")

    def say(self, text: str) -> None:
        """A line that stays, above what moves."""
        if self._live is not None:
            self._live.console.print(text, soft_wrap=True)
        else:
            note(text)

    def measure(self, record: Record, least: float = 0.0) -> None:
        """Tokens a second of training since the last measurement, `least` seconds ago or more."""
        if self._marked is None:
            self._rate, self._marked = record.tok_s, record
        elif (seconds := record.seconds - self._marked.seconds) > least:
            self._rate = (record.tokens - self._marked.tokens) / seconds
            self._marked = record

    def line(self, record: Record) -> str:
        """`step 120/1,000  loss 1.842  lr 3.0e-03  41,200 tok/s  MFU 23%  50 s left`."""
        used = self._rate * self.flops / self.peak
        parts = (
            f"step {record.step:,}/{self.steps:,}",
            f"loss {record.loss:.3f}",
            f"lr {record.lr:.1e}",
            f"{self._rate:,.0f} tok/s",
            f"MFU {used:.0%}" if self.flops else "",
            f"{self.left(record.step)} left",
        )
        return "  ".join(part for part in parts if part)

    def left(self, step: int) -> str:
        from glassllama.train.estimate import duration

        each = (time.perf_counter() - self._started) / (step - self.first)
        return duration(each * (self.steps - step))


def curve(values: Sequence[float], width: int) -> str:
    """The values as a row of at most `width` blocks, each the mean of its share of them."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [at * len(values) // count for at in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
