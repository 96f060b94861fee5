"""Everything that decides how a training run goes, as frozen, checked dataclasses.

A preset or a TOML file has one table for each class: `[model] [data] [optimiser] [schedule] [run]`
(train/resolve.py reads them). What is wrong is a ConfigError that names `table.field`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glassllama.base.errors import ConfigError, quoted

LARGEST_RATE = 1e6  # beyond any run: what is larger is a mistake
KINDS = ("bigram", "gpt", "llama")
CHARACTERS, BPE = "characters", "bpe:"
MOST_DIGITS = 18  # of a vocabulary's size
SEED_LIMIT = 1 << 32  # the other half of 64 bits counts ranks and steps
LEAST_SHARE = 1e-6  # held out: of a thousand million characters, a thousand


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which architecture, and its sizes: the fields of its configuration class.

    `max_seq_len` follows from data.context and does not stand here. `vocab_size`, the rows of the
    embeddings, follows from the tokenizer; more rows than it has tokens can be set, as a model to
    begin with may have them. The configuration class checks its sizes itself. `init_from` is a
    model as `load` takes it, whose weights the run begins with; "": random ones.
    """

    kind: str
    dropout: float = 0.0
    init_from: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("model.kind", self.kind, KINDS)
        shares("model", self, "dropout")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learnt from: `corpus` is a name or a path of a text, a folder, or JSON lines.

    `tokenizer` is "characters", "bpe:N" for N tokens learnt from the text itself, or the path of a
    folder with a vocabulary. `batch` counts rows of one optimiser step, over all ranks and all
    `run.accumulate` parts; each row is a window of `context` tokens.
    """

    corpus: str
    tokenizer: str = CHARACTERS
    held_out: float = 0.1  # share of the text for validation
    context: int
    batch: int

    def __post_init__(self) -> None:
        for name in ("corpus", "tokenizer"):
            if not getattr(self, name).strip():
                raise ConfigError(f"data.{name}: want a name or a path, got none")
        positive("data", self, "context", "batch")
        if not LEAST_SHARE <= self.held_out < 1:
            raise ConfigError(
                f"data.held_out: want a share from {LEAST_SHARE} to below 1, got {self.held_out}"
            )
        if self.tokenizer.startswith(BPE) and self.bpe_size is None:
            raise ConfigError(
                f"data.tokenizer: want bpe:N with a number of tokens, got {quoted(self.tokenizer)}"
            )

    @property
    def bpe_size(self) -> int | None:
        size = self.tokenizer.removeprefix(BPE)
        fits = size.isdecimal() and len(size) <= MOST_DIGITS
        return int(size) if self.tokenizer.startswith(BPE) and fits else None


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """AdamW for all parameters, or Muon for the matrices inside layers and AdamW for the rest."""

    kind: str = "adamw"
    lr: float  # AdamW's
    matrix_lr: float = 0.02  # Muon's
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # Muon's
    weight_decay: float = 0.0  # of matrices only, decoupled
    clip: float = 1.0  # largest norm of all gradients together; 0: no limit
    ema: float = 0.0  # decay per step of a running mean of the weights, which is kept; 0: none

    def __post_init__(self) -> None:
        one_of("optimiser.kind", self.kind, ("adamw", "muon"))
        positive("optimiser", self, "lr", "matrix_lr", "eps")
        shares("optimiser", self, "beta1", "beta2", "momentum", "ema")
        not_negative("optimiser", self, "weight_decay", "clip")
        of_a_rate("optimiser", self, "lr", "matrix_lr", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How the learning rate moves over `steps`: up over `warmup` steps, then down.

    "cosine" falls along half a cosine to `floor` times the peak; "wsd" stays at the peak and falls
    straight to `floor` over the last `decay` share of the steps.
    """

    kind: str = "wsd"
    steps: int
    warmup: int = 0
    decay: float = 0.4
    floor: float = 0.0

    def __post_init__(self) -> None:
        one_of("schedule.kind", self.kind, ("cosine", "wsd"))
        positive("schedule", self, "steps")
        not_negative("schedule", self, "warmup", "floor")
        of_a_rate("schedule", self, "floor")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"schedule.decay: want a share in (0, 1], got {self.decay}")
        if self.warmup >= self.steps and self.steps > 1:
            raise ConfigError(
                f"schedule.warmup: {self.warmup} steps of warmup do not fit into {self.steps} "
                f"steps in all; add --set schedule.warmup={self.steps // 10}"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How the run is carried out; numbers of steps at which something happens, 0: never."""

    seed: int = 1
    device: str = "cpu"
    precision: str = "float32"  # of matrix products: or "bfloat16", or "auto", the faster one here
    compile: bool = False
    accumulate: int = 1  # parts that a batch is cut into, to save memory
    loss_chunk: int = 8192  # logits of so many positions are held at once
    eval_every: int = 250
    save_every: int = 250
    sample_every: int = 0
    sample_tokens: int = 200
    prompt: str = "\n"  # what samples begin with
    keep: int = 2  # checkpoints, the best one besides
    tensorboard: bool = False

    def __post_init__(self) -> None:
        one_of("run.precision", self.precision, ("float32", "bfloat16", "auto"))
        positive("run", self, "accumulate", "loss_chunk", "keep", "sample_tokens")
        not_negative("run", self, "seed", "eval_every", "save_every", "sample_every")
        if self.seed >= SEED_LIMIT:
            raise ConfigError(f"run.seed: want a whole number below 2^32, got {self.seed}")
        if not self.prompt:
            raise ConfigError("run.prompt: want at least one character, got none")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One whole run; `name` is the preset's, or the file's."""

    name: str
    model: ModelSettings
    data: DataSettings
    optimiser: OptimiserSettings
    schedule: ScheduleSettings
    run: RunSettings

    def __post_init__(self) -> None:
        if self.data.batch % self.run.accumulate:
            raise ConfigError(
                f"run.accumulate: {self.data.batch} rows (data.batch) cannot be cut into "
                f"{self.run.accumulate} equal parts"
            )


def one_of(place: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{place}: want one of {', '.join(choices)}, got {quoted(value)}")


def positive(table: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{table}.{name}: want a number above 0, got {value}")


def not_negative(table: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{table}.{name}: want 0 or more, got {value}")


def of_a_rate(table: str, settings: object, *names: str) -> None:
    """Steps multiply them by each other, and divide by small numbers, in float32."""
    for name in names:
        value = getattr(settings, name)
        if value > LARGEST_RATE:
            raise ConfigError(f"{table}.{name}: want a number up to {LARGEST_RATE:g}, got {value}")


def shares(table: str, settings: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise ConfigError(
                f"{table}.{name}: want a number in [0, 1), got {getattr(settings, name)}"
            )
