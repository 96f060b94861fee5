"""One training run: all that it is made of, and how it is saved and taken up again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glassllama.base.errors import named, quoted
from glassllama.base.fields import Fields
from glassllama.models.language_model import LanguageModel
from glassllama.train.batches import Batches
from glassllama.train.checkpoints import prune, publish, unfinished, write_checkpoint
from glassllama.train.data import Data
from glassllama.train.distributed import ALONE, Team, is_sharded
from glassllama.train.ema import Average
from glassllama.train.faults import TrainingError
from glassllama.train.model_factory import as_module
from glassllama.train.optimizers import Optimisers
from glassllama.train.settings import Settings
from glassllama.weights.model_files import read_json
from glassllama.weights.save import save_model, save_tensors

CHECKPOINTS = "checkpoints"  # the folder of them in a run's folder
TENSORS = "training.safetensors"  # in a checkpoint: the tensors of a process alone
SHARDS = "training"  # or the folder of those of several ranks
FORMAT = "glassllama training 1"
LARGEST_STATE = 1 << 20  # bytes of state.json
LARGEST_COUNT = 1 << 24  # AdamW counts its steps in float32
REMEDY = "damaged; remove this checkpoint, or begin a new run with --out"
TEXTS = ("training text", "validation text")  # whose hashes are part of a run's identity


@dataclass
class Progress:
    """How far a run is. Everything random follows from `run.seed` and `step`."""

    step: int = 0  # optimiser steps made
    seconds: float = 0.0  # spent on them
    best_step: int | None = None
    best_loss: float | None = None

    def note_score(self, loss: float) -> bool:
        """Whether this validation loss is the best so far; if so it is remembered."""
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self.best_step, self.best_loss = self.step, loss
        return True


@dataclass
class Run:
    """What the loop in train/loop.py works on."""

    settings: Settings
    folder: Path
    data: Data
    model: LanguageModel
    optimisers: Optimisers
    batches: Batches
    average: Average | None = None
    progress: Progress = field(default_factory=Progress)
    team: Team = ALONE
    extended: str = ""  # how the schedule differs from that of the run that was taken up

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def complete(self) -> bool:
        return self.progress.step >= self.settings.schedule.steps

    @property
    def tokens_per_step(self) -> int:
        return self.settings.data.batch * self.settings.data.context

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be halves of one."""
        texts = (self.data.learnt.sha256, self.data.held_out.sha256)
        return dict(zip(TEXTS, texts, strict=True)) | essential(self.settings)


# What may change between two halves of the same run: it has no influence on the weights.
REPORTING = (
    "eval_every", "save_every", "sample_every", "sample_tokens", "prompt", "keep", "tensorboard",
)  # fmt: skip


def essential(settings: Settings) -> dict[str, Any]:
    """The settings that the weights depend on, `table.field` -> value."""
    named = {
        f"{table}.{name}": value
        for table, values in asdict(settings).items()
        if isinstance(values, dict)
        for name, value in values.items()
        if not (table == "run" and name in REPORTING) and (table, name) != ("data", "corpus")
    }
    if not settings.model.init_from:  # runs of older versions have no such setting
        del named["model.init_from"]
    return named


def averaged(run: Run) -> AbstractContextManager[None]:
    """Within, the model is the one to be judged and kept: the running mean, where there is one."""
    return nullcontext() if run.average is None else run.average.in_place()


@contextmanager
def used(run: Run) -> Iterator[None]:
    """Within, that model may be run; forward passes are not followed by backward ones."""
    with averaged(run):
        if run.team.alone:
            yield
            return
        from glassllama.train.sharding import asked

        with asked(run.model):
            yield


def save(run: Run) -> None:
    """Write a checkpoint of this moment; the best so far becomes what the run's folder holds.

    Every rank writes its share of the tensors, and the leader all the rest.
    """
    state, step = training_state(run), run.progress.step
    with averaged(run):
        model = whole_model(run)

        def write(folder: Path) -> None:
            write_tensors(run, state, folder)
            about = {"format": FORMAT, "progress": asdict(run.progress), "identity": run.identity()}
            text = json.dumps(about, indent=1) + "\n"
            (folder / "state.json").write_text(text, encoding="utf-8")
            save_model(folder, model, run.data.tokenizer, vocabulary=run.data.vocabulary)

        if run.team.leads:
            checkpoint = write_checkpoint(run.checkpoints, step, write)
            if run.progress.best_step in (None, step):
                publish(checkpoint, run.folder)
            prune(run.checkpoints, run.settings.run.keep, run.progress.best_step)
        else:
            write_tensors(run, state, unfinished(run.checkpoints, step))
    run.team.wait()


def whole_model(run: Run) -> LanguageModel:
    """The model, with all its weights where they are written."""
    if run.team.alone:
        return run.model
    from glassllama.train import sharding

    return sharding.whole_model(run.model, run.settings, run.team)


def write_tensors(run: Run, state: Mapping[str, Tensor], folder: Path) -> None:
    """`training_state` into the folder of a checkpoint that is being written."""
    if run.team.alone:
        try:
            save_tensors(state, folder / TENSORS)
        except SafetensorError as error:  # how its writer says that the disk is full
            raise OSError(str(error)) from None
        return
    from glassllama.train.shards import write_shards

    run.team.wait()  # for the leader to make the folder
    write_shards(folder / SHARDS, state)


def training_state(run: Run) -> dict[str, Tensor]:
    """Every tensor that the next step depends on, under our names; each with its own memory."""
    parameters = as_module(run.model).named_parameters()
    state = {f"weights.{name}": weight.detach() for name, weight in parameters}
    state |= run.optimisers.state()
    if run.average is not None:
        state |= run.average.state()
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def resume(run: Run, checkpoint: Path) -> None:
    """Take up `run` where that checkpoint was written.

    With more `schedule.steps` than it had then, the rest of its steps follow the new schedule.
    Raises TrainingError naming what differs, where it was written by another run; or what is
    damaged.
    """
    refuse_pickles(checkpoint)
    state = read_state(checkpoint)
    run.extended = require_same(checkpoint, state.identity, run.identity())
    tensors = stored_state(run, checkpoint)
    require_sound(checkpoint, tensors, state.progress.step)
    with torch.no_grad():
        for name, weight in as_module(run.model).named_parameters():
            weight.copy_(tensors[f"weights.{name}"])
    run.optimisers.load_state(tensors)
    if run.average is not None:
        run.average.load_state(tensors)
    run.progress = state.progress


def stored_state(run: Run, checkpoint: Path) -> dict[str, Tensor]:
    """What `training_state` was then: whole, or this rank's share; whoever wrote it, and how many.

    Raises TrainingError: damage, other tensors than this run's.
    """
    whole, shards = checkpoint / TENSORS, checkpoint / SHARDS
    tensors = empty_state(run)
    if run.team.alone and not shards.exists():
        read_tensors(whole, tensors)
        return tensors
    from glassllama.train.shards import read_shards, read_whole

    if shards.exists():
        read_shards(shards, tensors, alone=run.team.alone)
    else:
        read_whole(whole, tensors)
    return tensors


def refuse_pickles(checkpoint: Path) -> None:
    """Raise TrainingError where a folder holds PyTorch's own form of a distributed checkpoint."""
    for folder in (checkpoint, checkpoint / SHARDS):
        if (folder / ".metadata").exists() or list(folder.glob("*.distcp")):
            raise TrainingError(
                f"{folder}: a checkpoint of torch.distributed by another program: its pickles can "
                "run anything, so they are not opened; bring models here as safetensors"
            )


def empty_state(run: Run) -> dict[str, Tensor]:
    """Tensors to be filled, like those of `training_state`."""
    parameters = dict(as_module(run.model).named_parameters())
    empty = {}
    for name in training_names(run):
        ours = max((each for each in parameters if name.endswith(f".{each}")), key=len)
        alike = torch.empty_like(parameters[ours].detach())
        counts = name.startswith("adamw.step.")
        empty[name] = torch.zeros((), device=alike.device) if counts else alike
    return empty


def training_names(run: Run) -> Iterator[str]:
    """What `training_state` holds once a step was made."""
    names = [name for name, _ in as_module(run.model).named_parameters()]
    yield from (f"weights.{name}" for name in names)
    yield from run.optimisers.state_names()
    if run.average is not None:
        yield from run.average.state()


def read_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors from a file that a process alone has written, one at a time.

    Raises TrainingError: missing or other tensors, other shapes or types, damage.
    """
    try:
        with safe_open(path, "pt") as file:
            if odd := sorted(set(file.keys()) ^ set(into)):
                names = ", ".join(quoted(name) for name in odd[:5])
                raise TrainingError(f"{path}: missing or not expected: {names}")
            for name, tensor in into.items():
                found = file.get_slice(name)
                shape, dtype = tuple(found.get_shape()), found.get_dtype()
                if shape != tuple(tensor.shape) or dtype != "F32":
                    raise TrainingError(
                        f"{path}: {name} is {dtype} of shape {quoted(shape)}, expected F32 of "
                        f"{tuple(tensor.shape)}"
                    )
                tensor.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: {error}") from None


def require_sound(checkpoint: Path, tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise TrainingError where a number of the state cannot be one after `step` steps."""
    for name, tensor in tensors.items():
        own = cast(Any, tensor).to_local() if is_sharded(tensor) else tensor
        if not bool(torch.isfinite(own).all()):
            fault = "numbers that are not finite"
        elif name.startswith("adamw.exp_avg_sq.") and bool((own < 0).any()):
            fault = "means of squares below 0"
        elif name.startswith("adamw.step.") and float(own) != min(step, LARGEST_COUNT):
            fault = f"{float(own):g}, expected {step}"
        else:
            continue
        raise TrainingError(f"{checkpoint}: {name} holds {fault}: {REMEDY}")


class State(NamedTuple):
    """What state.json says: how far the run was, and what the run is."""

    progress: Progress
    identity: Mapping[str, Any]


def read_state(checkpoint: Path) -> State:
    """state.json of a checkpoint.

    Raises TrainingError: of another format, incomplete, numbers that cannot be; ConfigError:
    missing, no JSON.
    """
    path = checkpoint / "state.json"
    if path.is_file() and path.stat().st_size > LARGEST_STATE:
        raise TrainingError(f"{path}: more than {LARGEST_STATE:,} bytes: {REMEDY}")
    values = read_json(path)
    if (came := values.get("format")) != FORMAT:
        raise TrainingError(
            f"{path}: format is {quoted(came)}, expected {FORMAT!r}, or written by another "
            f"version: {REMEDY}"
        )
    try:
        get = Fields(str(path), values, TrainingError)
        progress = read_progress(get.object("progress"))
        if checkpoint.name.removeprefix("step-") != f"{progress.step:06d}":
            raise TrainingError(f"{path}: progress: step is {progress.step}, not the folder's")
        identity = get.object("identity")
        identity.whole("schedule.steps")
    except TrainingError as error:
        raise TrainingError(f"{error}: {REMEDY}") from None
    return State(progress, identity.values)


def read_progress(get: Fields) -> Progress:
    step = get.whole("step", least=0)
    best_step = get.whole("best_step", None, least=0, most=step)
    best_loss = get.number("best_loss", None)
    if (best_step is None) != (best_loss is None):
        raise TrainingError(f"{get.place}: best_step and best_loss belong together")
    seconds = get.number("seconds", least=0.0)
    return Progress(step=step, seconds=seconds, best_step=best_step, best_loss=best_loss)


def require_same_settings(checkpoint: Path, settings: Settings) -> None:
    """Raise TrainingError where that checkpoint's run had other settings; texts are not looked at.

    Also as `read_state` does.
    """
    was = read_state(checkpoint).identity
    require_same(checkpoint, {n: v for n, v in was.items() if n not in TEXTS}, essential(settings))


def require_same(place: Path, was: Mapping[str, Any], is_now: Mapping[str, Any]) -> str:
    """Raise TrainingError unless both identities are equal, naming each difference.

    With more steps than before the schedule may differ -> in what.
    """
    differs = [name for name in sorted({*was, *is_now}) if was.get(name) != is_now.get(name)]
    there, here = (
        {name: quoted(values[name]) if name in values else "not set" for name in differs}
        for values in (was, is_now)
    )
    said = [f"{named(name)} was {there[name]}, is {here[name]}" for name in differs]
    if is_now["schedule.steps"] > was["schedule.steps"]:
        others = [line for line in said if not line.startswith("schedule.")]
        if not others:
            return "; ".join(said)
        said = others
    if said:
        shorter = is_now["schedule.steps"] < was["schedule.steps"]
        longer = "; a run can be extended, not shortened" if shorter else ""
        raise TrainingError(
            f"{place}: another run: {'; '.join(said[:5])}{longer}; begin a new one with --out"
        )
    return ""
