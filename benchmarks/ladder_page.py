"""docs/ladder.md and docs/ladder.svg, from the result lines of benchmarks/ladder.py alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PICTURE = ROOT / "docs" / "ladder.md", ROOT / "docs" / "ladder.svg"
SEEDS = 3  # with fewer, a ladder counts as not finished
FIRST = "GPT"  # what speeds are compared with

# Student's t: 95 % of means of n differences are within t · deviation / √n; by n - 1.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Lesson:
    """What a rung is about. `before`: what it is compared with."""

    question: str
    change: str
    meant_for: str
    before: str = ""


LESSONS = {
    "bigram": Lesson(
        "How far does one character alone get us?",
        "A table: row *i* holds how well each character follows character *i*. No layer looks at "
        "anything else ([`models/bigram.py`](../src/glassllama/models/bigram.py)).",
        "It is the bar that everything with layers has to pass, and what a broken model falls back "
        "to: a loss that stays here sees no context.",
    ),
    "GPT": Lesson(
        "What does looking back bring?",
        "Four layers of attention and feed-forward; positions are a learned table, added to the "
        "embeddings ([`models/gpt.py`](../src/glassllama/models/gpt.py), GPT-2 without biases).",
        "Every character now sees up to 63 before it, and depth combines what was seen.",
        "bigram",
    ),
    "+ RMSNorm": Lesson(
        "Does a norm have to subtract the mean?",
        "`LayerNorm` → `RMSNorm`: divide by the root mean square, leave the mean alone (Zhang & "
        "Sennrich, 2019).",
        "It is meant to save work, not to lower the loss: one sum less over every vector.",
        "GPT",
    ),
    "+ RoPE": Lesson(
        "Where a token stands, or how far apart two are?",
        "The table of positions goes; each pair of coordinates of queries and keys is turned by an "
        "angle that grows with the position (Su et al., 2021). A score then depends on the "
        "distance alone.",
        "“Three characters ago” is one thing to learn instead of one for each place, and no "
        "position is without training.",
        "+ RMSNorm",
    ),
    "+ SwiGLU": Lesson(
        "Can a layer decide what to let through?",
        "`down(gelu(up(x)))` → `down(silu(gate(x)) · up(x))` (Shazeer, 2020). Three matrices "
        "instead of two, so the features are two thirds as many: 344 instead of 512.",
        "A product of two linear maps can say “this feature, if that one”. The paper has no "
        "explanation either: it attributes the success “to divine benevolence”.",
        "+ RoPE",
    ),
    "+ GQA": Lesson(
        "Does every query need its own key and value?",
        "Four query heads share two key/value heads (Ainslie et al., 2023). What `wk` and `wv` "
        "lose goes to the features, 384 of them.",
        "It is meant for use, not for training: half the cache, so twice the conversation fits "
        "into the same memory, and each new token reads half as much.",
        "+ SwiGLU",
    ),
    "+ QK-norm": Lesson(
        "Does the length of a query mean anything?",
        "Queries and keys are divided by their root mean square after the rotation, without "
        "weights, so that scores compare directions only (Henry et al., 2020; as in Llama 4).",
        "Scores cannot grow until softmax sees one token only: it is meant to allow larger "
        "learning rates and long runs without accidents.",
        "+ GQA",
    ),
    "+ Muon": Lesson(
        "Same model: can each step be a better one?",
        "AdamW → Muon for the matrices inside the layers "
        "([`train/muon.py`](../src/glassllama/train/muon.py), Jordan et al., 2024); embeddings and "
        "norms stay with AdamW. The update is made orthogonal, so that rare directions move as "
        "much as common ones.",
        "Fewer steps to the same loss, each somewhat dearer.",
        "+ QK-norm",
    ),
    "GPT with Muon": Lesson(
        "Beside the ladder: was it the optimiser alone?",
        "The GPT of the second rung, trained by Muon.",
        "Compare the four corners: GPT and Llama, AdamW and Muon.",
        "GPT",
    ),
}

HEAD = """# The ladder: from a bigram to a Llama, measured

What does each part of a Llama do for it? Here every rung changes **one thing** of the rung below
([`benchmarks/rungs.py`](../benchmarks/rungs.py): a class of a few lines each). A test proves that
the first rung with layers is `models/gpt.py` and the last ones are `models/llama.py`, on the same
weights. This page is written by `python benchmarks/ladder.py --render` from the lines in
`benchmarks/results/`; `make ladder` measures what is missing there and writes it again.

**The same for all:** Tiny Shakespeare, {steps} steps of {batch} × {context}: {tokens:,} characters,
which is one pass over the text. Four layers, width 128, about 0.8 million parameters: as near to
each other as the parts allow. One learning rate for all rungs with AdamW ({lr:g}), tuned on the
*GPT* alone, so that no later rung is favoured; warmup, then half a cosine to zero; clipping at 1;
no dropout. Seed *n* means the same batches in every rung.

**Loss** is that of the whole validation split ({held_out:,} characters), in nats per character,
mean ± standard deviation over seeds. **Against the rung below** is the mean of the differences
between runs of the same seed, with a 95 % interval (Student's t): where it holds 0, so few seeds
cannot tell the two apart. **KV** is what a cache keeps of each token in bfloat16. **Speed** of
training is relative to the GPT, by processor time of one thread, the best of some short turns in
plain PyTorch. There LayerNorm is one fused operation, while RMSNorm and the rotation are several in
plain sight: what is less arithmetic is not less time yet. Fused by hand, they are in
[`native/training/blocks.py`](../src/glassllama/native/training/blocks.py).
"""
HELD_OUT = 111_540  # characters of Tiny Shakespeare's validation split

CHARACTERS_HEAD = "\n## Characters\n\n"
PICTURE_TEXT = """
![Training curves, and the losses of all seeds](ladder.svg)

Left: loss of the batches while training, mean over seeds. Right: validation loss at the end, a dot
for each seed and a line for the mean. The bigram is off the scale.
"""
BPE_HEAD = """
## The same with tokens

All plays of Shakespeare, in tokens of a byte-level BPE of 1,024 learnt from them. Losses
per token are larger, because a token is more than a character: bits per byte can be compared.

"""
READING = """
## Rung by rung
"""
LIMITS = """
## What this does not show

A model of 0.8 million parameters after one pass over one megabyte, at one learning rate: seconds of
training where real models take months. RMSNorm, GQA and QK-norm were made for problems of size
(speed, memory, stability) that hardly exist here; where a rung gains nothing in this table, that is
what was measured, and no proof that it is useless. What lasts is the way of asking: one change at a
time, the same data, several seeds, and the spread beside the mean.

**Check yourself:** `python benchmarks/ladder.py --seeds 5` adds two seeds: which intervals shrink
below zero? **Go deeper:** [`nn/attention.py`](../src/glassllama/nn/attention.py) →
`Attention.place`, [`train/muon.py`](../src/glassllama/train/muon.py) → `orthogonalise`.
"""

Line = dict[str, Any]
Ladder = dict[str, dict[int, Line]]  # rung -> seed -> result


def read_lines(path: Path) -> list[Line]:
    """The results in a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_rung(lines: list[Line]) -> Ladder:
    ladder: Ladder = {}
    for name in LESSONS:
        if runs := {line["seed"]: line for line in lines if line["rung"] == name}:
            ladder[name] = runs
    return ladder


# --- numbers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """How a loss differs from the rung below's, over the seeds that both have."""

    mean: float
    within: float  # half of the 95 % interval; infinite for one seed
    seeds: int

    def __str__(self) -> str:
        if math.isinf(self.within):
            return signed(self.mean)
        return f"{signed(self.mean)} ± {self.within:.3f}"

    @property
    def verdict(self) -> str:
        if math.isinf(self.within):
            return "from one seed, so nobody knows how much of it is chance"
        if self.mean + self.within < 0:
            return "it helps here"
        if self.mean - self.within > 0:
            return "it hurts here"
        return f"no difference that {self.seeds} seeds can show"


def signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "−")


def change(ladder: Ladder, name: str) -> Change | None:
    """None where there is nothing to compare with."""
    runs, before = ladder[name], ladder.get(LESSONS[name].before, {})
    both = sorted(runs.keys() & before.keys())
    differences = [runs[seed]["val_loss"] - before[seed]["val_loss"] for seed in both]
    if not both:
        return None
    within = math.inf
    if len(both) > 1:
        within = STUDENT[len(both) - 2] * stdev(differences) / math.sqrt(len(both))
    return Change(fmean(differences), within, len(both))


def spread(runs: Mapping[int, Line], key: str = "val_loss") -> str:
    """Mean ± standard deviation over the seeds."""
    values = [run[key] for run in runs.values()]
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def some_run(runs: Mapping[int, Line]) -> Line:
    """What does not depend on the seed."""
    return runs[min(runs)]


# --- the page -------------------------------------------------------------------------------


def table(ladder: Ladder, speeds: Mapping[str, float], bits: bool) -> str:
    head = ["", "parameters", "KV bytes per token", "validation loss", "against the rung below"]
    head += ["bits per byte"] * bits + ["speed", "training takes"]
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    for name, runs in ladder.items():
        run, difference = some_run(runs), change(ladder, name)
        tokens, speed = run["steps"] * run["batch"] * run["context"], speeds.get(name)
        rows.append([
            name, f"{run['parameters']:,}", f"{run['kv_bytes']:,}", spread(runs),
            "" if difference is None else str(difference),
            *[spread(runs, "bits_per_byte")] * bits,
            "" if speed is None else f"{speed / speeds[FIRST]:.2f} ×",
            "" if speed is None else f"{tokens / speed:.0f} s",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def lessons(ladder: Ladder, speeds: Mapping[str, float]) -> Iterator[str]:
    for name, runs in ladder.items():
        lesson = LESSONS[name]
        yield f"\n### {name}\n\n*{lesson.question}* {lesson.change}\n\n{lesson.meant_for}\n\n"
        yield f"**Here:** {found(ladder, name, runs, speeds)}\n"


def found(ladder: Ladder, name: str, runs: dict[int, Line], speeds: Mapping[str, float]) -> str:
    """What it gained and what it cost, in a sentence or two."""
    difference, lesson = change(ladder, name), LESSONS[name]
    if difference is None:
        return f"a loss of {spread(runs)}."
    said = f"loss {spread(runs)}, {difference} against {lesson.before}: {difference.verdict}."
    run, before = some_run(runs), some_run(ladder[lesson.before])
    more = run["parameters"] - before["parameters"]
    if lesson.before != "bigram":
        said += " Parameters: " + (f"{more:+,}" if more else "as many").replace("-", "−") + "."
        if run["kv_bytes"] != before["kv_bytes"]:
            said += f" Cache: {run['kv_bytes'] / before['kv_bytes']:g} × that of before."
        if name in speeds:
            said += f" Training at {speeds[name] / speeds[lesson.before]:.2f} × the speed."
    return said


def unfinished(ladder: Ladder) -> str:
    """Said on top of a table that is not whole."""
    seeds = max(SEEDS, *(max(runs) for runs in ladder.values()))
    there, wanted = sum(len(runs) for runs in ladder.values()), seeds * len(LESSONS)
    if there == wanted:
        return ""
    return (
        f"**Not finished: {there} of {wanted} runs are there.** `make ladder` makes the rest.\n\n"
    )


def section(results: Path, data: str) -> tuple[Ladder, Mapping[str, float], str]:
    """One corpus: its ladder, its speeds and its table."""
    ladder = by_rung(read_lines(results / f"ladder-{data}.jsonl"))
    speed_lines = read_lines(results / f"ladder-{data}-speed.jsonl")
    speeds = {line["rung"]: line["tok_s"] for line in speed_lines}
    if not ladder:
        return ladder, speeds, ""
    rows = unfinished(ladder) + table(ladder, speeds, bits=data == "bpe")
    if speed_lines:
        load = speed_lines[0]["load"]
        rows += f"\nSpeeds were measured at a load average of {load:.1f}: ratios, not records.\n"
    return ladder, speeds, rows


def page(results: Path = RESULTS) -> str:
    """docs/ladder.md, as the results there say."""
    ladder, speeds, rows = section(results, "characters")
    run = some_run(ladder[FIRST])
    text = HEAD.format(
        tokens=run["steps"] * run["batch"] * run["context"], held_out=HELD_OUT,
        steps=run["steps"], batch=run["batch"], context=run["context"],
        lr=run["optimiser"]["lr"],
    )  # fmt: skip
    text += CHARACTERS_HEAD + rows + PICTURE_TEXT + READING + "".join(lessons(ladder, speeds))
    *_, tokens = section(results, "bpe")
    return text + (BPE_HEAD + tokens if tokens else "") + LIMITS


# --- the picture ----------------------------------------------------------------------------


def draw(ladder: Ladder, path: Path) -> None:
    """Curves at the left, final losses at the right; the same file for the same results."""
    import matplotlib as mpl
    import matplotlib.figure as drawing

    names = [name for name in ladder if name != "bigram"]
    shades = mpl.colormaps["viridis"]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ladder", "font.size": 9}):
        figure = drawing.Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for place, name in enumerate(names):
            colour = shades(0.95 * place / max(1, len(names) - 1))
            draw_rung(left, right, ladder[name], name, colour, -place)
        left.set(xlabel="step", ylabel="training loss, nats per character")
        right.set(xlabel="validation loss", yticks=[-n for n in range(len(names))])
        right.set_yticklabels(names)
        left.legend(fontsize=8)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_rung(
    left: Any, right: Any, runs: dict[int, Line], name: str, colour: Any, height: int
) -> None:
    curves = [run["curve"] for run in runs.values()]
    run = some_run(runs)
    every = math.ceil(run["steps"] / len(run["curve"]))
    steps = [min(run["steps"], every * (n + 0.5)) for n in range(len(run["curve"]))]
    means = [fmean(point) for point in zip(*curves, strict=True)]
    dashed = "--" if name == "GPT with Muon" else "-"
    left.plot(steps[1:], means[1:], dashed, color=colour, linewidth=1.2, label=name)
    losses = [run["val_loss"] for run in runs.values()]
    right.plot(losses, [height] * len(losses), "o", color=colour, markersize=5, alpha=0.8)
    right.vlines(fmean(losses), height - 0.3, height + 0.3, color=colour, linewidth=2)


def render(results: Path = RESULTS) -> None:
    PAGE.write_text(page(results), encoding="utf-8")
    draw(by_rung(read_lines(results / "ladder-characters.jsonl")), PICTURE)
