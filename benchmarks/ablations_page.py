"""docs/ablations.md and docs/ablations.svg, from the results of benchmarks/ablations.py."""

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
PAGE, PICTURE = ROOT / "docs" / "ablations.md", ROOT / "docs" / "ablations.svg"
SEEDS = 3  # with fewer seeds the page is marked as incomplete
FIRST = "GPT"  # speeds are relative to this variant

# Student's t for 95 % by degrees of freedom: the mean of n differences ± t · deviation / √n.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Part:
    """What a variant changes. `before` is the variant it is compared with."""

    question: str
    change: str
    meant_for: str
    before: str = ""


PARTS = {
    "bigram": Part(
        "How well does one character alone predict the next?",
        "A table: row *i* has the logits of the character after character *i*. There are no layers "
        "([`models/bigram.py`](../src/glassllama/models/bigram.py)).",
        "A lower bound for everything with layers, and what a broken model falls back to: a loss "
        "that stays here uses no context.",
    ),
    "GPT": Part(
        "What does context bring?",
        "Four layers of attention and feed-forward; positions are a learned table, added to the "
        "embeddings ([`models/gpt.py`](../src/glassllama/models/gpt.py), GPT-2 without biases).",
        "Every character attends to up to 63 characters before it, and the layers combine them.",
        "bigram",
    ),
    "+ RMSNorm": Part(
        "Does a norm have to subtract the mean?",
        "`LayerNorm` → `RMSNorm`: divide by the root mean square, leave the mean alone (Zhang & "
        "Sennrich, 2019).",
        "Meant to save work, not to lower the loss: one sum less over every vector.",
        "GPT",
    ),
    "+ RoPE": Part(
        "Absolute or relative positions?",
        "The table of positions is removed; each pair of coordinates of queries and keys is "
        "rotated by an angle proportional to the position (Su et al., 2021). A score then depends "
        "on the distance alone.",
        "“Three characters before” is learned once instead of once per position, and no position "
        "is without training.",
        "+ RMSNorm",
    ),
    "+ SwiGLU": Part(
        "Does a gate in the feed-forward part help?",
        "`down(gelu(up(x)))` → `down(silu(gate(x)) · up(x))` (Shazeer, 2020). Three matrices "
        "instead of two, so the width is two thirds: 344 instead of 512.",
        "A product of two linear maps can express “this feature, if that one is present”. The "
        "paper has no explanation either: it attributes the success “to divine benevolence”.",
        "+ RoPE",
    ),
    "+ GQA": Part(
        "Does every query head need its own keys and values?",
        "Four query heads share two key/value heads (Ainslie et al., 2023). The parameters that "
        "`wk` and `wv` lose are added to the feed-forward part: width 384.",
        "Meant for inference, not for training: half the KV cache, so twice the context fits into "
        "the same memory, and each new token reads half as much.",
        "+ SwiGLU",
    ),
    "+ QK-norm": Part(
        "Does the length of a query matter?",
        "Queries and keys are divided by their root mean square after the rotation, without "
        "weights, so that scores compare directions only (Henry et al., 2020; as in Llama 4).",
        "Scores cannot grow until softmax selects one token only: meant to allow larger learning "
        "rates and long runs without instabilities.",
        "+ GQA",
    ),
    "+ Muon": Part(
        "Does another optimizer train the same model better?",
        "AdamW → Muon for the matrices inside the layers "
        "([`train/optimizers.py`](../src/glassllama/train/optimizers.py), Jordan et al., 2024); "
        "embeddings and norms stay with AdamW. The update is orthogonalized, so that weak "
        "directions move as much as strong ones.",
        "Fewer steps to the same loss, each somewhat slower.",
        "+ QK-norm",
    ),
    "GPT with Muon": Part(
        "Is the gain due to the optimizer alone?",
        "The GPT of the second row, trained by Muon.",
        "Compare the four combinations: GPT and Llama, AdamW and Muon.",
        "GPT",
    ),
}

HEAD = """# What each part of a Llama brings

Here every variant changes **one thing** of the variant before it
([`benchmarks/ablation_models.py`](../benchmarks/ablation_models.py): a class of a few lines each).
A test proves that the first variant with layers is `models/gpt.py` and the last ones are
`models/llama.py`, on the same weights. This page is written by `python benchmarks/ablations.py
--render` from the lines in `benchmarks/results/`; `make ablations` measures what is missing there
and writes it again.

**The same for all:** Tiny Shakespeare, {steps} steps of {batch} × {context}: {tokens:,} characters,
which is one pass over the text. Four layers, width 128, about 0.8 million parameters: as nearly
equal as the parts allow. One learning rate for all variants with AdamW ({lr:g}), tuned on the *GPT*
alone, so that no later variant is favored; warmup, then half a cosine to zero; gradients clipped at
1; no dropout. Seed *n* means the same batches for every variant.

**Loss** is that of the whole validation split ({val:,} characters), in nats per character, mean
± standard deviation over seeds. **Against the variant before** is the mean of the differences
between runs of the same seed, with a 95 % interval (Student's t): if it contains 0, so few seeds
cannot distinguish the two. **KV** is the size of a KV cache in bfloat16. **Speed** of training is
relative to the GPT, by CPU time of one thread, the best of several short runs in plain PyTorch.
There LayerNorm is one fused operation, while RMSNorm and RoPE are several, so that less arithmetic
may take more time. Fused versions are in
[`native/training/blocks.py`](../src/glassllama/native/training/blocks.py).
"""
VAL_CHARACTERS = 111_540  # of Tiny Shakespeare's validation split

CHARACTERS_HEAD = "\n## Characters\n\n"
PICTURE_TEXT = """
![Training curves, and the losses of all seeds](ablations.svg)

Left: loss of the training batches, mean over seeds. Right: validation loss at the end, a dot for
each seed and a line for the mean. The bigram is outside the scale.
"""
BPE_HEAD = """
## The same with tokens

All plays of Shakespeare, in tokens of a byte-level BPE of 1,024 trained on them. Losses per token
are larger, because a token is more than a character; bits per byte can be compared.

"""
READING = """
## Variant by variant
"""
LIMITS = """
## What this does not show

A model of 0.8 million parameters after one pass over one megabyte, at one learning rate: seconds of
training where real models take months. RMSNorm, GQA and QK-norm solve problems of large models
(speed, memory, stability) that hardly exist here; a variant that gains nothing in this table is not
proven useless. The method is general: one change at a time, the same data, several seeds, and the
spread together with the mean.

**Try it:** `python benchmarks/ablations.py --seeds 5` adds two seeds: which intervals shrink below
zero? **Read on:** [`nn/attention.py`](../src/glassllama/nn/attention.py) → `Attention.apply_rope`,
[`train/optimizers.py`](../src/glassllama/train/optimizers.py) → `orthogonalize`.
"""

Line = dict[str, Any]
Results = dict[str, dict[int, Line]]  # variant -> seed -> result


def read_lines(path: Path) -> list[Line]:
    """The results in a file; none if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_variant(lines: list[Line]) -> Results:
    measured: Results = {}
    for name in PARTS:
        if runs := {line["seed"]: line for line in lines if line["variant"] == name}:
            measured[name] = runs
    return measured


# --- numbers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Difference of a loss from that of the variant before, over the seeds that both have."""

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
            return "from one seed, so chance is not known"
        if self.mean + self.within < 0:
            return "it helps here"
        if self.mean - self.within > 0:
            return "it hurts here"
        return f"no difference that {self.seeds} seeds can show"


def signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "−")


def change(measured: Results, name: str) -> Change | None:
    """None if no run can be compared."""
    runs, before = measured[name], measured.get(PARTS[name].before, {})
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


def any_run(runs: Mapping[int, Line]) -> Line:
    """Any run, for values that do not depend on the seed."""
    return runs[min(runs)]


# --- the page -------------------------------------------------------------------------------


def table(measured: Results, speeds: Mapping[str, float], bits: bool) -> str:
    head = ["", "parameters", "KV bytes per token", "validation loss", "against the variant before"]
    head += ["bits per byte"] * bits + ["speed", "training takes"]
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    for name, runs in measured.items():
        run, difference = any_run(runs), change(measured, name)
        tokens, speed = run["steps"] * run["batch"] * run["context"], speeds.get(name)
        rows.append([
            name, f"{run['parameters']:,}", f"{run['kv_bytes']:,}", spread(runs),
            "" if difference is None else str(difference),
            *[spread(runs, "bits_per_byte")] * bits,
            "" if speed is None else f"{speed / speeds[FIRST]:.2f} ×",
            "" if speed is None else f"{tokens / speed:.0f} s",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def part_sections(measured: Results, speeds: Mapping[str, float]) -> Iterator[str]:
    for name, runs in measured.items():
        part = PARTS[name]
        yield f"\n### {name}\n\n*{part.question}* {part.change}\n\n{part.meant_for}\n\n"
        yield f"**Here:** {found(measured, name, runs, speeds)}\n"


def found(measured: Results, name: str, runs: dict[int, Line], speeds: Mapping[str, float]) -> str:
    """Gain and cost of a variant in one or two sentences."""
    difference, part = change(measured, name), PARTS[name]
    if difference is None:
        return f"a loss of {spread(runs)}."
    text = f"loss {spread(runs)}, {difference} against {part.before}: {difference.verdict}."
    run, before = any_run(runs), any_run(measured[part.before])
    more = run["parameters"] - before["parameters"]
    if part.before != "bigram":
        text += " Parameters: " + (f"{more:+,}" if more else "as many").replace("-", "−") + "."
        if run["kv_bytes"] != before["kv_bytes"]:
            text += f" Cache: {run['kv_bytes'] / before['kv_bytes']:g} × that of before."
        if name in speeds:
            text += f" Training at {speeds[name] / speeds[part.before]:.2f} × the speed."
    return text


def unfinished(measured: Results) -> str:
    """A line above a table that is incomplete."""
    seeds = max(SEEDS, *(max(runs) for runs in measured.values()))
    there, expected = sum(len(runs) for runs in measured.values()), seeds * len(PARTS)
    if there == expected:
        return ""
    runs = f"{there} of {expected} runs are done"
    return f"**Not finished: {runs}.** `make ablations` measures the rest.\n\n"


def section(results: Path, data: str) -> tuple[Results, Mapping[str, float], str]:
    """One corpus: its results, its speeds and its table."""
    measured = by_variant(read_lines(results / f"ablations-{data}.jsonl"))
    speed_lines = read_lines(results / f"ablations-{data}-speed.jsonl")
    speeds = {line["variant"]: line["tok_s"] for line in speed_lines}
    if not measured:
        return measured, speeds, ""
    rows = unfinished(measured) + table(measured, speeds, bits=data == "bpe")
    if speed_lines:
        load = speed_lines[0]["load"]
        rows += f"\nSpeeds were measured at a load average of {load:.1f}; compare ratios only.\n"
    return measured, speeds, rows


def page(results: Path = RESULTS) -> str:
    """docs/ablations.md, from the results."""
    measured, speeds, rows = section(results, "characters")
    run = any_run(measured[FIRST])
    text = HEAD.format(
        tokens=run["steps"] * run["batch"] * run["context"], val=VAL_CHARACTERS,
        steps=run["steps"], batch=run["batch"], context=run["context"],
        lr=run["optimizer"]["lr"],
    )  # fmt: skip
    text += (
        CHARACTERS_HEAD + rows + PICTURE_TEXT + READING + "".join(part_sections(measured, speeds))
    )
    *_, tokens = section(results, "bpe")
    return text + (BPE_HEAD + tokens if tokens else "") + LIMITS


# --- the picture ----------------------------------------------------------------------------


def draw(measured: Results, path: Path) -> None:
    """Curves on the left, final losses on the right. The same results give the same file."""
    import matplotlib as mpl
    import matplotlib.figure as drawing

    names = [name for name in measured if name != "bigram"]
    shades = mpl.colormaps["viridis"]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ladder", "font.size": 9}):
        figure = drawing.Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for row, name in enumerate(names):
            color = shades(0.95 * row / max(1, len(names) - 1))
            draw_variant(left, right, measured[name], name, color, -row)
        left.set(xlabel="step", ylabel="training loss, nats per character")
        right.set(xlabel="validation loss", yticks=[-n for n in range(len(names))])
        right.set_yticklabels(names)
        left.legend(fontsize=8)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_variant(
    left: Any, right: Any, runs: dict[int, Line], name: str, color: Any, height: int
) -> None:
    curves = [run["curve"] for run in runs.values()]
    run = any_run(runs)
    every = math.ceil(run["steps"] / len(run["curve"]))
    steps = [min(run["steps"], every * (n + 0.5)) for n in range(len(run["curve"]))]
    means = [fmean(point) for point in zip(*curves, strict=True)]
    dashed = "--" if name == "GPT with Muon" else "-"
    left.plot(steps[1:], means[1:], dashed, color=color, linewidth=1.2, label=name)
    losses = [run["val_loss"] for run in runs.values()]
    right.plot(losses, [height] * len(losses), "o", color=color, markersize=5, alpha=0.8)
    right.vlines(fmean(losses), height - 0.3, height + 0.3, color=color, linewidth=2)


def render(results: Path = RESULTS) -> None:
    PAGE.write_text(page(results), encoding="utf-8")
    draw(by_variant(read_lines(results / "ablations-characters.jsonl")), PICTURE)
