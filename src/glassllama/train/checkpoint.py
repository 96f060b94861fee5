"""A training run and its checkpoints: folders that are complete or absent; saving, resuming.

    RUN/checkpoints/step-000500/    model.safetensors config.json … as `load` reads them,
                                    training.safetensors, state.json
    RUN/model.safetensors …         hard links to the files of the best checkpoint

A folder is written under a name that begins with a dot, forced to disk, and renamed; it is removed
in the reverse order. So a name without a dot is a complete checkpoint, and a name with one is a
leftover of an interrupted run, removed before the next.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glassllama.base.errors import TrainingError, quoted
from glassllama.base.fields import Fields
from glassllama.models.language_model import LanguageModel
from glassllama.train.corpus import Data
from glassllama.train.distributed import (
    SINGLE_PROCESS,
    DistContext,
    accept_full_tensors,
    is_sharded,
)
from glassllama.train.optimizers import EMA, Optimizers
from glassllama.train.settings import Settings, fingerprint, require_same_run
from glassllama.train.tokens import Batches
from glassllama.weights.model_files import read_json
from glassllama.weights.save import save_model, save_tensors

TEXTS = ("training text", "validation text")  # their hashes are part of a run's identity


@dataclass
class Progress:
    """How far a run is. All random numbers follow from `run.seed` and `step`."""

    step: int = 0  # optimizer steps made
    seconds: float = 0.0  # spent on them
    best_step: int | None = None
    best_loss: float | None = None

    def record_score(self, loss: float) -> bool:
        """Whether this validation loss is the best so far; if so it is stored."""
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self.best_step, self.best_loss = self.step, loss
        return True


@dataclass
class Run:
    """What the training loop works on."""

    settings: Settings
    folder: Path
    data: Data
    model: LanguageModel
    optimizers: Optimizers
    batches: Batches
    ema: EMA | None = None
    progress: Progress = field(default_factory=Progress)
    dist: DistContext = SINGLE_PROCESS
    extended: str = ""  # how the schedule differs from that of the resumed run

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def complete(self) -> bool:
        return self.progress.step >= self.settings.schedule.steps

    @property
    def tokens_per_step(self) -> int:
        return self.settings.data.batch * self.settings.data.context

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has its averaged weights, if there are any."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    def identity(self) -> dict[str, Any]:
        """What must be equal in the run that wrote a checkpoint and the run that resumes it."""
        texts = (self.data.train.sha256, self.data.val.sha256)
        return dict(zip(TEXTS, texts, strict=True)) | fingerprint(self.settings)


# --- checkpoints ----------------------------------------------------------------------------

COMPLETE = re.compile(r"step-(\d{6,})")
UNFINISHED = ".unfinished-"
TENSORS = "training.safetensors"  # the training state of a single process
SHARDS = "training"  # or the folder with that of several ranks
STATE_FILES = (TENSORS, SHARDS, "state.json")  # the other files are the model's
FORMAT = "glassllama training 1"
LARGEST_STATE = 1 << 20  # bytes of state.json
LARGEST_COUNT = 1 << 24  # AdamW counts its steps in float32
REMEDY = "damaged; remove this checkpoint, or begin a new run with --out"


# --- folders --------------------------------------------------------------------------------


def write_checkpoint(home: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a new folder, then give it the name of this step, atomically.

    Raises TrainingError if the disk is full or the folder cannot be written; complete checkpoints
    are left as they are.
    """
    final, new = home / f"step-{step:06d}", unfinished(home, step)
    try:
        home.mkdir(parents=True, exist_ok=True)
        remove(new)
        new.mkdir()
        write(new)
        for file in new.rglob("*"):
            force_to_disk(file)
        force_to_disk(new)
        remove(final)
        new.rename(final)
        force_to_disk(home)
    except OSError as error:
        raise TrainingError(
            f"{final}: cannot be saved ({error.strerror or error}); earlier checkpoints are intact"
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return final


def unfinished(home: Path, step: int) -> Path:
    """The folder of a checkpoint that is being written."""
    return home / f"{UNFINISHED}step-{step:06d}"


def remove(folder: Path) -> None:
    """Rename a folder before its files are removed, so that half of it is never read."""
    if not folder.exists():
        return
    old = folder.with_name(f"{UNFINISHED}old-{folder.name.removeprefix(UNFINISHED)}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def force_to_disk(path: Path) -> None:
    """Wait until the file, or the folder's list of names, would survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete_steps(home: Path) -> dict[int, Path]:
    """The complete checkpoints by step, in order."""
    if not home.is_dir():
        return {}
    found = ((COMPLETE.fullmatch(folder.name), folder) for folder in home.iterdir())
    return dict(sorted((int(match[1]), folder) for match, folder in found if match))


def remove_unfinished(home: Path) -> list[str]:
    """Remove the leftovers of interrupted runs; their names."""
    leftovers = sorted(home.glob(f"{UNFINISHED}*")) if home.is_dir() else []
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return [leftover.name for leftover in leftovers]


def prune(home: Path, keep: int, best: int | None) -> None:
    """Remove all but the last `keep` checkpoints and the best one."""
    steps = complete_steps(home)
    for step in list(steps)[:-keep]:
        if step != best:
            remove(steps[step])


def publish(checkpoint: Path, folder: Path) -> None:
    """Put the model of this checkpoint into the run's folder, each file atomically."""
    files = [file for file in checkpoint.iterdir() if file.name not in STATE_FILES]
    for file in sorted(files, key=lambda file: file.name == "config.json"):  # completes a model
        partial = folder / f".{file.name}"
        partial.unlink(missing_ok=True)
        try:
            os.link(file, partial)
        except OSError:  # a file system without links
            shutil.copyfile(file, partial)
        os.replace(partial, folder / file.name)


# --- saving ---------------------------------------------------------------------------------


@contextmanager
def eval_weights(run: Run) -> Iterator[None]:
    """Inside, the model has its averaged weights, if there are any, and is not trained."""
    with run.averaged():
        if run.dist.is_single:
            yield
            return
        from glassllama.train.sharding import inference

        with inference(run.model):
            yield


def save(run: Run) -> None:
    """Write a checkpoint of this step; the best one so far becomes the model in the run's folder.

    Every rank writes its rows of the tensors, rank 0 everything else.
    """
    state, step = training_state(run), run.progress.step
    with run.averaged():
        model = run.model
        if not run.dist.is_single:
            from glassllama.train.sharding import gathered_model

            model = gathered_model(run.model, run.settings, run.dist)

        def write(folder: Path) -> None:
            write_state(run, state, folder)
            about = {"format": FORMAT, "progress": asdict(run.progress), "identity": run.identity()}
            text = json.dumps(about, indent=1) + "\n"
            (folder / "state.json").write_text(text, encoding="utf-8")
            save_model(folder, model, run.data.tokenizer, vocabulary=run.data.vocabulary)

        if run.dist.is_rank0:
            checkpoint = write_checkpoint(run.checkpoints, step, write)
            if run.progress.best_step in (None, step):
                publish(checkpoint, run.folder)
            prune(run.checkpoints, run.settings.run.keep, run.progress.best_step)
        else:
            write_state(run, state, unfinished(run.checkpoints, step))
    run.dist.barrier()


def write_state(run: Run, state: Mapping[str, Tensor], folder: Path) -> None:
    """The training state, into the folder of a checkpoint that is being written."""
    if run.dist.is_single:
        try:
            save_tensors(state, folder / TENSORS)
        except SafetensorError as error:  # raised by its writer when the disk is full
            raise OSError(str(error)) from None
        return
    from glassllama.train.sharding import write_shards

    run.dist.barrier()  # rank 0 makes the folder
    write_shards(folder / SHARDS, state)


def live_state(run: Run) -> dict[str, Tensor]:
    """All tensors that the next step depends on, by name."""
    weights = {f"weights.{name}": p.detach() for name, p in run.model.named_parameters()}
    return weights | run.optimizers.state() | ({} if run.ema is None else run.ema.state())


def training_state(run: Run) -> dict[str, Tensor]:
    """Copies of these tensors."""
    return {name: tensor.contiguous().clone() for name, tensor in live_state(run).items()}


# --- resuming -------------------------------------------------------------------------------


def maybe_resume(run: Run) -> bool:
    """Continue from the last checkpoint -> whether there is one. Removes unfinished ones."""
    steps = complete_steps(run.checkpoints)
    if steps:
        resume(run, steps[max(steps)])
    if run.dist.is_rank0:
        remove_unfinished(run.checkpoints)
    return bool(steps)


def resume(run: Run, checkpoint: Path) -> None:
    """Load weights, optimizer state and progress of a checkpoint of this run.

    With more `schedule.steps` than it had, the remaining steps follow the new schedule. Raises
    TrainingError: another run, with what differs; damage.
    """
    refuse_pickles(checkpoint)
    progress, identity = read_state(checkpoint)
    run.extended = require_same_run(str(checkpoint), identity, run.identity())
    tensors, shards = training_state(run), checkpoint / SHARDS
    if shards.exists():
        from glassllama.train.sharding import read_shards

        read_shards(shards, tensors, single=run.dist.is_single)
    else:
        with accept_full_tensors(not run.dist.is_single):
            read_tensors(checkpoint / TENSORS, tensors)
    require_sound(checkpoint, tensors, progress.step)
    with torch.no_grad():
        for name, tensor in live_state(run).items():
            tensor.copy_(tensors[name])
    run.progress = progress


def refuse_pickles(checkpoint: Path) -> None:
    """Raise TrainingError for a distributed checkpoint in PyTorch's own format."""
    for folder in (checkpoint, checkpoint / SHARDS):
        if (folder / ".metadata").exists() or list(folder.glob("*.distcp")):
            raise TrainingError(
                f"{folder}: a checkpoint of torch.distributed by another program: its pickles can "
                "run any code, so they are not opened; convert the model to safetensors"
            )


def read_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors from a file of a single process, one at a time.

    Raises TrainingError: missing or unexpected tensors, other shapes or types, damage.
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
    """Raise TrainingError for values that are not possible after `step` steps."""
    for name, tensor in tensors.items():
        local = cast(Any, tensor).to_local() if is_sharded(tensor) else tensor
        if not bool(torch.isfinite(local).all()):
            problem = "numbers that are not finite"
        elif name.startswith("adamw.exp_avg_sq.") and bool((local < 0).any()):
            problem = "means of squares below 0"
        elif name.startswith("adamw.step.") and float(local) != min(step, LARGEST_COUNT):
            problem = f"{float(local):g}, expected {step}"
        else:
            continue
        raise TrainingError(f"{checkpoint}: {name} has {problem}: {REMEDY}")


def read_state(checkpoint: Path) -> tuple[Progress, Mapping[str, Any]]:
    """The progress and the identity of the run in state.json.

    Raises TrainingError: another format, incomplete, impossible values; ConfigError: missing, not
    JSON.
    """
    path = checkpoint / "state.json"
    if path.is_file() and path.stat().st_size > LARGEST_STATE:
        raise TrainingError(f"{path}: more than {LARGEST_STATE:,} bytes: {REMEDY}")
    values = read_json(path)
    try:
        if (came := values.get("format")) != FORMAT:
            raise TrainingError(
                f"{path}: format is {quoted(came)}, expected {FORMAT!r}, or written by another "
                "version"
            )
        get = Fields(str(path), values, TrainingError)
        progress = read_progress(get.object("progress"))
        if checkpoint.name.removeprefix("step-") != f"{progress.step:06d}":
            raise TrainingError(f"{path}: progress: step is {progress.step}, not the folder's")
        identity = get.object("identity")
        identity.integer("schedule.steps")
    except TrainingError as error:
        raise TrainingError(f"{error}: {REMEDY}") from None
    return progress, identity.values


def read_progress(get: Fields) -> Progress:
    step, seconds = get.integer("step", minimum=0), get.number("seconds", minimum=0.0)
    best_step = get.integer("best_step", None, minimum=0, maximum=step)
    best_loss = get.number("best_loss", None)
    if (best_step is None) != (best_loss is None):
        raise TrainingError(f"{get.source}: best_step and best_loss belong together")
    return Progress(step=step, seconds=seconds, best_step=best_step, best_loss=best_loss)
