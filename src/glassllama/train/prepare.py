"""From settings to a run that can begin, or go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from glassllama.models.language_model import LanguageModel
from glassllama.nn.init import shapes_only
from glassllama.train.batches import Batches, require_window
from glassllama.train.checkpoints import complete_steps, sweep
from glassllama.train.data import Data
from glassllama.train.distributed import ALONE, Team
from glassllama.train.ema import Average
from glassllama.train.estimate import require_space
from glassllama.train.model_factory import as_module, make_model, new_model
from glassllama.train.optimizers import Optimisers
from glassllama.train.precision import choose_arithmetic
from glassllama.train.run import CHECKPOINTS, Run, resume
from glassllama.train.settings import Settings


def prepare(
    settings: Settings, data: Data, folder: Path, team: Team = ALONE, *, offline: bool = False
) -> Run:
    """A new run, or this rank's share of it, nothing made yet.

    Its weights are random, or those of `model.init_from`; where the folder holds a checkpoint of
    the run, `take_up` will replace them. Raises GlassError: sizes or texts that cannot be, another
    model; MemoryShortError before any is taken.
    """
    team.require_even(settings.data.batch, settings.run.accumulate)
    require_window(data.held_out, settings.data.context)
    require_space(settings, data, team)
    model = first_weights(settings, data.tokenizer.vocab_size, team)
    if settings.model.init_from and not complete_steps(folder / CHECKPOINTS):
        from glassllama.train.warm_start import fill_from

        fill_from(model, settings.model.init_from, data.tokenizer, offline=offline)
    module = as_module(model).train()
    return Run(
        settings=settings,
        folder=folder,
        data=data,
        model=model,
        optimisers=Optimisers(module, settings.optimiser),
        batches=Batches(data.learnt, settings.data.context, settings.data.batch, settings.run.seed),
        average=Average(module, settings.optimiser.ema) if settings.optimiser.ema else None,
        team=team,
    )


def first_weights(settings: Settings, vocab_size: int, team: Team) -> LanguageModel:
    """A new model; of several ranks each never holds more than its share and one tensor."""
    if team.alone:
        model = make_model(settings, vocab_size)
        choose_arithmetic(model, settings.run, settings.model.dropout)
        return model
    from glassllama.train.sharding import shard

    with shapes_only():
        model = new_model(settings, vocab_size)
    choose_arithmetic(model, settings.run, settings.model.dropout)
    shard(model, settings, team)
    return model


def rehearsal(settings: Settings, data: Data, folder: Path, team: Team) -> Run:
    """A run by one rank alone, on its share of a batch: what preflight.py looks at."""
    share = settings.data.batch // team.world
    return prepare(replace(settings, data=replace(settings.data, batch=share)), data, folder)


def take_up(run: Run) -> bool:
    """Go on from the folder's last checkpoint -> whether there was one; sweep what is half done."""
    steps = complete_steps(run.checkpoints)
    if steps:
        resume(run, steps[max(steps)])
    if run.team.leads:
        sweep(run.checkpoints)
    return bool(steps)
