"""Settings of a training run: frozen dataclasses, read from presets, TOML files and `--set`.

A preset or TOML file has one table per class: `[model] [data] [optimizer] [schedule] [run]`. The
type and range of a setting are declared with the field and checked whenever an object is made; each
error is a ConfigError that names `table.field`. PyTorch is not imported here.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from glassllama.base.errors import ConfigError, TrainingError, named, quoted
from glassllama.base.fields import MAX_INTEGER, is_integer, is_number

KINDS = ("bigram", "gpt", "llama")
CHARACTERS, BPE = "characters", "bpe:"
BPE_DIGITS = 18  # largest number of digits of N in "bpe:N"
SEED_LIMIT = 1 << 32  # the other half of a 64-bit seed holds rank and step
WHOLE, POSITIVE = f"[0, {MAX_INTEGER}]", f"[1, {MAX_INTEGER}]"  # intervals of whole numbers
RATE = "(0, 1e6]"  # products of rates stay finite in float32
FRACTION = "[0, 1)"
NEAREST = 0.5  # similarity from which another name is suggested


def number(interval: str, default: Any = MISSING) -> Any:
    """A field with a number inside an interval: "[0, 1)" includes 0 and excludes 1."""
    return field(default=default, metadata={"interval": interval})


def choice(*choices: str, default: Any = MISSING) -> Any:
    """A field with one of several words."""
    return field(default=default, metadata={"choices": choices})


def text(default: Any = MISSING) -> Any:
    """A field with text that is not empty."""
    return field(default=default, metadata={"nonempty": True})


class Table:
    """Base of the settings classes: checks every field when an object is made."""

    table: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):  # type: ignore[arg-type]
            key, value = f"{self.table}.{each.name}", getattr(self, each.name)
            value = check_value(key, value, hints[each.name], **each.metadata)
            object.__setattr__(self, each.name, value)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Table):
    """Which architecture, and its sizes: the fields of its configuration class.

    `max_seq_len` follows from data.context and is not set here. `vocab_size`, the rows of the
    embeddings, follows from the tokenizer; it may be set larger, as in checkpoints with padded
    vocabularies. `init_from` names a model, as `load` takes it, with whose weights the run starts;
    "" means random weights. The configuration class checks `sizes` when the model is built.
    """

    table = "model"
    kind: str = choice(*KINDS)
    dropout: float = number(FRACTION, 0.0)
    init_from: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Table):
    """The text: `corpus` is a name, or the path of a text, of a folder of texts, or of JSON lines.

    `tokenizer` is "characters", "bpe:N" for a BPE of N tokens trained on the text, or the path of
    a folder with a vocabulary. `batch` counts the rows of one optimizer step, over all ranks and
    all `run.accumulate` microbatches; each row is a window of `context` tokens.
    """

    table = "data"
    corpus: str = text()
    tokenizer: str = text(CHARACTERS)
    val_fraction: float = number("[1e-6, 1)", 0.1)  # share of the text for validation
    context: int = number(POSITIVE)
    batch: int = number(POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer.startswith(BPE) and self.bpe_size is None:
            raise ConfigError(
                f"data.tokenizer must be bpe:N with a number N, got {quoted(self.tokenizer)}"
            )

    @property
    def bpe_size(self) -> int | None:
        size = self.tokenizer.removeprefix(BPE)
        fits = size.isdecimal() and len(size) <= BPE_DIGITS
        return int(size) if self.tokenizer.startswith(BPE) and fits else None


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Table):
    """AdamW for all parameters, or Muon for the matrices inside layers and AdamW for the rest."""

    table = "optimizer"
    kind: str = choice("adamw", "muon", default="adamw")
    lr: float = number(RATE)  # of AdamW
    matrix_lr: float = number(RATE, 0.02)  # of Muon
    beta1: float = number(FRACTION, 0.9)
    beta2: float = number(FRACTION, 0.95)
    eps: float = number("(0, inf)", 1e-8)
    momentum: float = number(FRACTION, 0.95)  # of Muon
    weight_decay: float = number("[0, 1e6]", 0.0)  # decoupled; of matrices only
    grad_clip: float = number("[0, inf)", 1.0)  # largest norm of all gradients together; 0: off
    ema: float = number(FRACTION, 0.0)  # decay per step of the averaged weights; 0: none


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(Table):
    """The learning rate over `steps`: linear warmup over `warmup` steps, then decay.

    "cosine" decays along half a cosine to `min_lr_ratio` times the peak; "wsd" (warmup, stable,
    decay) stays at the peak and decays linearly to it over the last `decay` share of the steps.
    """

    table = "schedule"
    kind: str = choice("cosine", "wsd", default="wsd")
    steps: int = number(POSITIVE)
    warmup: int = number(WHOLE, 0)
    decay: float = number("(0, 1]", 0.4)
    min_lr_ratio: float = number("[0, 1e6]", 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= self.steps > 1:
            raise ConfigError(
                f"schedule.warmup: {self.warmup} steps of warmup do not fit into {self.steps} "
                f"steps in all; add --set schedule.warmup={self.steps // 10}"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Table):
    """How the run is carried out. `…_every` are numbers of steps; 0: never."""

    table = "run"
    seed: int = number(f"[0, {SEED_LIMIT - 1}]", 1)
    device: str = "cpu"
    precision: str = choice("float32", "bfloat16", "auto", default="float32")  # of matrix products
    compile: bool = False
    accumulate: int = number(POSITIVE, 1)  # microbatches of a batch, to save memory
    loss_chunk: int = number(POSITIVE, 8192)  # positions whose logits are in memory at once
    eval_every: int = number(WHOLE, 250)
    save_every: int = number(WHOLE, 250)
    sample_every: int = number(WHOLE, 0)
    sample_tokens: int = number(POSITIVE, 200)
    prompt: str = text("\n")  # of samples
    keep: int = number(POSITIVE, 2)  # checkpoints, besides the best one
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run; `name` is that of the preset or the file."""

    name: str
    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    run: RunSettings

    def __post_init__(self) -> None:
        if self.data.batch % self.run.accumulate:
            raise ConfigError(
                f"run.accumulate: {self.data.batch} rows (data.batch) cannot be cut into "
                f"{self.run.accumulate} equal microbatches"
            )


def check_value(
    key: str,
    value: Any,
    kind: Any,
    *,
    interval: str = "",
    choices: Sequence[str] = (),
    nonempty: bool = False,
) -> Any:
    """The value of setting `key`, if it is of that type and in range. Raises ConfigError."""
    if kind is int:
        expected = f"a whole number in {interval or WHOLE}"
        fits = is_integer(value) and inside(value, interval or WHOLE)
    elif kind is float:
        expected = f"a finite number in {interval}" if interval else "a finite number"
        fits = is_number(value) and (not interval or inside(value, interval))
    elif kind is bool:
        expected, fits = "true or false", isinstance(value, bool)
    elif choices:
        expected, fits = f"one of {', '.join(choices)}", value in choices
    elif kind is str:
        expected = "non-empty text in UTF-8" if nonempty else "text in UTF-8"
        fits = isinstance(value, str) and bool(value or not nonempty) and is_unicode(value)
    else:
        return value
    if not fits:
        raise ConfigError(f"{key} must be {expected}, got {quoted(value)}")
    return float(value) if kind is float else value


def inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    at_bound = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
    return at_bound or low < value < high


def is_unicode(value: str) -> bool:
    """Whether a text can be written as UTF-8: it has no halves of UTF-16 pairs."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


# --- files ----------------------------------------------------------------------------------

TABLES: dict[str, Any] = {
    each.table: each
    for each in (ModelSettings, DataSettings, OptimizerSettings, ScheduleSettings, RunSettings)
}
OLD_TABLES = {"optimiser": "optimizer"}
OLD_FIELDS = {
    "data.held_out": "data.val_fraction",
    "optimizer.clip": "optimizer.grad_clip",
    "schedule.floor": "schedule.min_lr_ratio",
}
LARGEST_FILE = 1 << 16  # bytes of a settings file
LONGEST_REASON = 120  # characters of the TOML reader's message
LONGEST_CHANGE = 1 << 12  # characters of a --set
# Python's TOML reader takes time quadratic in the number of parts of a key.
DEEP_KEY = re.compile(r"(?<![^\s.=#])(?:[^\s.=#]++[ \t]*+\.[ \t]*+){49}")
PRESETS = resources.files("glassllama.train") / "presets"
Tables = dict[str, dict[str, Any]]


def current_key(key: str) -> str:
    """`table.field` as it is called today; files and runs of older versions have other names."""
    table, dot, name = key.partition(".")
    key = f"{OLD_TABLES.get(table, table)}{dot}{name}"
    return OLD_FIELDS.get(key, key)


def preset_names() -> list[str]:
    return sorted(entry.name[:-5] for entry in PRESETS.iterdir() if entry.name.endswith(".toml"))


def load_settings(source: str, changes: Sequence[str] = ()) -> Settings:
    """The settings of a preset's name or a TOML file's path, after `table.field=value` changes.

    Two settings follow from others: if `schedule.steps` is changed and `schedule.warmup` is not, a
    warmup that does not fit becomes a tenth of the steps; if `model.init_from` is changed and
    `data.tokenizer` is not, the tokenizer is that model's. Raises ConfigError: no such preset or
    file, bad TOML, unknown fields, values of another type or out of range.
    """
    tables = read_tables(source)
    changed = {apply_change(tables, change) for change in changes}
    schedule, model, data = (tables.get(name, {}) for name in ("schedule", "model", "data"))
    steps, warmup = schedule.get("steps", 0), schedule.get("warmup", 0)
    steps_only = "schedule.steps" in changed and "schedule.warmup" not in changed
    if steps_only and is_integer(steps) and is_integer(warmup) and 0 < steps <= warmup:
        schedule["warmup"] = steps // 10
    new_model = "model.init_from" in changed or "tokenizer" not in data
    if model.get("init_from") and new_model and "data.tokenizer" not in changed:
        data["tokenizer"] = model["init_from"]
    return from_tables(source if source in preset_names() else Path(source).stem, tables)


def read_tables(source: str) -> Tables:
    """The tables of a preset or file, under today's names."""
    if source in preset_names():
        return parse(source, (PRESETS / f"{source}.toml").read_text(encoding="utf-8"))
    path = Path(source)
    if path.suffix != ".toml":
        raise ConfigError(
            f"{quoted(source)}: no preset and no .toml file{suggestion(source, preset_names())}"
        )
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{source}: more than {LARGEST_FILE:,} bytes: not a settings file")
    try:
        return parse(source, content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at byte {error.start}") from None


def parse(source: str, toml: str) -> Tables:
    if DEEP_KEY.search(toml):
        raise ConfigError(f"{source}: not valid TOML: a key of 50 parts or more")
    try:
        found = tomllib.loads(toml)
    except (ValueError, RecursionError) as error:  # also numbers and nesting too large for Python
        reason = str(error)[:LONGEST_REASON]
        raise ConfigError(f"{source}: not valid TOML: {reason}") from None
    tables: Tables = {}
    for name, values in found.items():
        table = tables.setdefault(table_name(source, name), {})
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {name} must be a table [{name}], got {quoted(values)}")
        for key, value in values.items():
            today = current_key(f"{name}.{key}").partition(".")[2]
            if today in table:
                raise ConfigError(f"{source}: {name}.{today} is set twice, once by its old name")
            table[today] = value
    return tables


def table_name(source: str, name: str) -> str:
    today = OLD_TABLES.get(name, name)
    if today not in TABLES:
        hint = suggestion(name, list(TABLES))
        raise ConfigError(f"{source}: unknown table [{quoted_key(name)}]{hint}")
    return today


def apply_change(tables: Tables, change: str) -> str:
    """Apply one `table.field=value` -> its `table.field`. The value is TOML; quotes may be left
    out of text."""
    key, equals, typed = change.partition("=")
    table, dot, name = current_key(key.strip()).partition(".")
    source = f"--set {quoted(change)}"
    if not (equals and dot and name):
        raise ConfigError(f"{source}: expected table.field=value, e.g. schedule.steps=500")
    table_name(source, table)
    if len(change) > LONGEST_CHANGE:
        raise ConfigError(f"{source}: more than {LONGEST_CHANGE:,} characters")
    try:
        read = tomllib.loads(f"value = {typed}")
    except (ValueError, RecursionError):
        read = {}
    # Text without quotes is not TOML; several lines would set more than this one value.
    value = read["value"] if set(read) == {"value"} else typed.strip()
    tables.setdefault(table, {})[name] = value
    return f"{table}.{name}"


def changed_lines(source: str, settings: Settings, changes: Sequence[str]) -> list[str]:
    """What the changes and what follows from them set, a line each: `schedule.steps = 500`."""
    before, after = read_tables(source), tables_of(settings)
    keys = [apply_change({}, change) for change in changes]
    for table, name in (("schedule", "warmup"), ("data", "tokenizer")):  # see `load_settings`
        value = after[table][name]
        if before.get(table, {}).get(name, value) != value:
            keys.append(f"{table}.{name}")
    if settings.model.init_from:
        keys.append("data.tokenizer")
    pairs = [key.partition(".")[::2] for key in dict.fromkeys(keys)]
    return [f"{table}.{name} = {toml_value(after[table][name])}" for table, name in pairs]


def from_tables(name: str, tables: Tables) -> Settings:
    """Settings from tables. Raises ConfigError that names `table.field`."""
    tables = {"run": {}, **tables}
    for table, values in tables.items():
        table_name(name, table)
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {table} must be a table, got {quoted(values)}")
    if missing := [table for table in TABLES if table not in tables]:
        raise ConfigError(f"{name}: table [{missing[0]}] is missing")
    own = {each.name for each in fields(ModelSettings)} - {"sizes"}
    model = dict(tables["model"])
    sizes = {key: model.pop(key) for key in [*model] if key not in own}
    tables["model"] = model | {"sizes": sizes}
    try:
        made = {table: filled(TABLES[table], tables[table]) for table in TABLES}
        return Settings(name=name, **made)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def filled(kind: Any, values: Mapping[str, Any]) -> Any:
    """`kind(**values)`, after the names were checked."""
    known = {each.name: each for each in fields(kind)}
    for name in values:
        if name not in known:
            hint = suggestion(name, list(known))
            raise ConfigError(f"{kind.table}.{quoted_key(name)}: no such setting{hint}")
    for name, each in known.items():
        if each.default is MISSING and each.default_factory is MISSING and name not in values:
            raise ConfigError(f"{kind.table}.{name} is missing")
    return kind(**values)


def quoted_key(name: str) -> str:
    """An unknown name for an error message."""
    return name if name.isidentifier() and len(name) <= 40 else quoted(name)


def suggestion(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name."""
    close = difflib.get_close_matches(name[:80], known, n=1, cutoff=NEAREST)
    return f"; did you mean {close[0]}?" if close else f"; have {', '.join(known)}"


def tables_of(settings: Settings) -> Tables:
    """The tables that `from_tables` makes these settings from, defaults included."""
    tables: Tables = {name: asdict(getattr(settings, name)) for name in TABLES}
    tables["model"] |= tables["model"].pop("sizes")
    return tables


def to_toml(settings: Settings) -> str:
    """The settings as a TOML file that `load_settings` reads back to the same."""
    blocks = []
    for name, table in tables_of(settings).items():
        lines = (f"{key} = {toml_value(value)}\n" for key, value in table.items())
        blocks.append(f"[{name}]\n{''.join(lines)}")
    return "\n".join(blocks)


def toml_value(value: object) -> str:
    """JSON writes text, numbers and booleans as TOML does, except for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# --- what identifies a run ------------------------------------------------------------------

# May change when a run is resumed: it has no influence on the weights.
REPORTING = {
    "run.eval_every", "run.save_every", "run.sample_every", "run.sample_tokens", "run.prompt",
    "run.keep", "run.tensorboard", "data.corpus",
}  # fmt: skip


def fingerprint(settings: Settings) -> dict[str, Any]:
    """The settings that the weights depend on, `table.field` -> value."""
    values = {
        f"{table}.{name}": value
        for table in TABLES
        for name, value in asdict(getattr(settings, table)).items()
        if f"{table}.{name}" not in REPORTING
    }
    if not settings.model.init_from:  # runs of older versions have no such setting
        del values["model.init_from"]
    return values


def require_same_run(source: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Raise TrainingError unless both identities are equal, naming each difference.

    With more steps than before the schedule may differ -> its differences.
    """
    before = {current_key(name): value for name, value in before.items()}
    differences = {}
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            was, is_ = (quoted(v[name]) if name in v else "not set" for v in (before, now))
            differences[name] = f"{named(name)} was {was}, is {is_}"
    steps = now["schedule.steps"] - before["schedule.steps"]
    others = [text for name, text in differences.items() if not name.startswith("schedule.")]
    if differences and (others or steps <= 0):
        shown = others if steps > 0 else list(differences.values())
        shorter = "; a run can be extended, not shortened" if steps < 0 else ""
        raise TrainingError(
            f"{source}: another run: {'; '.join(shown[:5])}{shorter}; begin a new one with --out"
        )
    return "; ".join(differences.values())
