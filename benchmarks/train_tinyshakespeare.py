"""Training on Tiny Shakespeare on a CPU: presets, compared with nanoGPT's recipe for CPUs.

    python benchmarks/train_tinyshakespeare.py --nanogpt FOLDER [--presets A B] [--rounds 1]
                                               [--set a.b=c …]

FOLDER is a checkout of nanoGPT; the command of its README is run unchanged. Each program measures
the time of its training steps, without evaluations. Both losses are over the whole validation
split; nanoGPT's is that of its last checkpoint, in windows of its own context. Prints a table and
one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from glassllama import hub
from glassllama.train.corpus import open_data
from glassllama.train.metrics import read_log
from glassllama.train.settings import DataSettings
from glassllama.train.tokens import every_window

PRESET = "llama-tinyshakespeare-cpu"
TARGET = 1.8857  # nanoGPT's loss when this target was set
CONTEXT, STEPS = 64, 2000
README_COMMAND = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    f"--log_interval=1 --block_size={CONTEXT} --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    f"--max_iters={STEPS} --lr_decay_iters={STEPS} --dropout=0.0"
).split()


class Run(NamedTuple):
    """Seconds of training steps so far, and the validation losses known then."""

    seconds: float
    steps: int
    scores: list[tuple[float, float]]  # (seconds, loss)

    def time_to(self, loss: float) -> float:
        return min((s for s, score in self.scores if score <= loss), default=math.inf)

    def best_within(self, seconds: float) -> float:
        return min((score for s, score in self.scores if s <= seconds), default=math.inf)


def nanogpt(checkout: Path, folder: Path) -> Run:
    """Run the command of nanoGPT's README in a folder with links to its files and with data."""
    folder.mkdir()
    for file in checkout.iterdir():
        if file.name != "data":
            (folder / file.name).symlink_to(file.resolve())
    text = hub.fetch_dataset("tinyshakespeare").read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text], np.uint16)
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    tables = {"stoi": dict(zip(characters, range(len(characters)), strict=True))}
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters), **tables}))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", *README_COMMAND],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    times = {int(i): float(t) for i, t in re.findall(r"iter (\d+):.*time ([\d.]+)ms", ran.stdout)}
    evaluations = {int(step) for step in re.findall(r"^step (\d+):", ran.stdout, re.MULTILINE)}
    # nanoGPT's time of a step includes its evaluation, if there is one.
    plain = [t / 1e3 for step, t in times.items() if step not in evaluations]
    seconds = sum(plain) + len(evaluations) * statistics.median(plain)
    loss = nanogpt_loss(checkout, folder)
    return Run(seconds, len(times), [(seconds, loss)])


def nanogpt_loss(checkout: Path, folder: Path) -> float:
    """Loss of nanoGPT's last checkpoint over the whole validation split."""
    sys.path.insert(0, str(checkout))
    model_file: Any = importlib.import_module("model")
    sys.path.remove(str(checkout))
    saved = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = model_file.GPT(model_file.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    settings = DataSettings(corpus="tinyshakespeare", context=CONTEXT, batch=1)
    val = open_data(settings, folder).val
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in every_window(val, CONTEXT, 128):
            targets = torch.from_numpy(batch.targets)
            logits, _ = model(torch.from_numpy(batch.ids), targets.clamp(min=0))
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            total, count = total + float(losses), count + int((targets >= 0).sum())
    return total / count


def ours(preset: str, folder: Path, changes: list[str]) -> Run:
    """`glassllama train` with a preset, evaluated often."""
    sets = [word for change in changes for word in ("--set", change)]
    command = ["train", preset, "--out", str(folder / "run"), "--no-preflight", *sets]
    subprocess.run([sys.executable, "-m", "glassllama", *command], check=True, capture_output=True)
    records = read_log(folder / "run")
    scores = [(r.seconds, r.val_loss) for r in records if r.val_loss is not None]
    return Run(records[-1].seconds, records[-1].step, scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--presets", nargs="+", default=[PRESET], metavar="PRESET")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            theirs, mine = nanogpt(options.nanogpt, Path(folder) / "nanogpt"), {}
            for preset in options.presets:
                run = ours(preset, Path(folder) / preset, options.changes)
                mine[preset] = compare(theirs, run)
        rounds.append(mine)
        print(f"round {number + 1}: {json.dumps(mine)}", file=sys.stderr, flush=True)
    result = {preset: medians([each[preset] for each in rounds]) for preset in options.presets}
    show(result)
    about = {"rounds": len(rounds), "threads": torch.get_num_threads(),
             "load": os.getloadavg()[0], "torch": torch.__version__}  # fmt: skip
    print(json.dumps(about | result))


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def compare(theirs: Run, mine: Run) -> dict[str, float]:
    return {
        "nanogpt_s": theirs.seconds,
        "nanogpt_ms_per_step": theirs.seconds / theirs.steps * 1e3,
        "nanogpt_loss": theirs.scores[-1][1],
        "ours_s": mine.seconds,
        "ours_ms_per_step": mine.seconds / mine.steps * 1e3,
        "ours_s_to_target": mine.time_to(TARGET),
        "ours_s_to_nanogpt_loss": mine.time_to(theirs.scores[-1][1]),
        "share_of_nanogpt_time": mine.time_to(TARGET) / theirs.seconds,
        "ours_best_within_nanogpt_time": mine.best_within(theirs.seconds),
        "ours_best": mine.best_within(math.inf),
    }


def show(result: dict[str, dict[str, float]]) -> None:
    print("| | seconds of steps | ms per step | validation loss |\n|---|--:|--:|--:|")
    theirs = next(iter(result.values()))
    print(f"| nanoGPT, CPU recipe, all steps | {theirs['nanogpt_s']:.1f} "
          f"| {theirs['nanogpt_ms_per_step']:.1f} | {theirs['nanogpt_loss']:.4f} |")  # fmt: skip
    for preset, r in result.items():
        for what, seconds, loss in (
            (f"to {TARGET}", r["ours_s_to_target"], f"≤ {TARGET}"),
            ("best within nanoGPT's time", r["nanogpt_s"], r["ours_best_within_nanogpt_time"]),
            ("best of all its steps", r["ours_s"], r["ours_best"]),
        ):
            each = f"{r['ours_ms_per_step']:.1f}"
            loss = loss if isinstance(loss, str) else f"{loss:.4f}"
            print(f"| {preset}, {what} | {seconds:.1f} | {each} | {loss} |")
    for preset, r in result.items():
        print(f"\n{preset}: {TARGET} after {r['share_of_nanogpt_time']:.3f} of nanoGPT's time "
              f"(target: {1 / 6:.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
