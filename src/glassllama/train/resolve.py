"""A preset or a TOML file, and what `--set` changes → Settings; and Settings → TOML again."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from glassllama.base.errors import ConfigError, quoted
from glassllama.base.fields import MAX_INTEGER, Fields, is_whole
from glassllama.train.settings import (
    SEED_LIMIT,
    DataSettings,
    ModelSettings,
    OptimiserSettings,
    RunSettings,
    ScheduleSettings,
    Settings,
)

TABLES = {
    "model": ModelSettings,
    "data": DataSettings,
    "optimiser": OptimiserSettings,
    "schedule": ScheduleSettings,
    "run": RunSettings,
}
LARGEST_FILE = 1 << 16  # bytes of a settings file
LONGEST_REASON = 120  # characters of what the TOML reader says
LONGEST_CHANGE = 1 << 12  # characters of a --set
DEEP_KEY = re.compile(r"(?<![^\s.=#])(?:[^\s.=#]++[ \t]*+\.[ \t]*+){49}")
PRESETS = resources.files("glassllama.train") / "presets"
Tables = dict[str, dict[str, Any]]


def preset_names() -> list[str]:
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in PRESETS.iterdir()
        if entry.name.endswith(".toml")
    )


def resolve(source: str, changes: Sequence[str] = ()) -> Settings:
    """The settings of a preset's name or a TOML file's path, after `table.field=value` changes.

    Two settings follow from changes: where `schedule.steps` is changed alone, a warmup that does
    not fit into it becomes a tenth of it; where `model.init_from` is changed alone, the tokenizer
    is that model's. Raises ConfigError: no such preset or file, bad TOML, unknown or mistyped
    fields, values out of range.
    """
    tables = read_tables(source)
    for change in changes:
        apply_change(tables, change)
    follow(tables, {change.partition("=")[0].strip() for change in changes})
    name = source if source in preset_names() else Path(source).stem
    return from_tables(name, tables)


def follow(tables: Tables, changed: set[str]) -> None:
    """Let what was not changed follow what was: see `resolve`."""
    schedule, model, data = (tables.get(name, {}) for name in ("schedule", "model", "data"))
    alone = "schedule.steps" in changed and "schedule.warmup" not in changed
    steps: Any = schedule.get("steps")
    warmup: Any = schedule.get("warmup")
    if alone and is_whole(steps) and is_whole(warmup) and 0 < steps <= warmup:
        schedule["warmup"] = steps // 10
    new_model = "model.init_from" in changed or "tokenizer" not in data
    if model.get("init_from") and new_model and "data.tokenizer" not in changed:
        data["tokenizer"] = model["init_from"]


def read_tables(source: str) -> Tables:
    """The tables as they stand in the preset or file."""
    if source in preset_names():
        return parse(source, (PRESETS / f"{source}.toml").read_text(encoding="utf-8"))
    path = Path(source)
    if path.suffix != ".toml":
        raise ConfigError(
            f"{quoted(source)}: no preset and no .toml file{_nearest(source, preset_names())}"
        )
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{source}: more than {LARGEST_FILE:,} bytes: no file of settings")
    try:
        return parse(source, content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at byte {error.start}") from None


def parse(place: str, text: str) -> Tables:
    if DEEP_KEY.search(text):  # Python's reader takes the square of their length
        raise ConfigError(f"{place}: not valid TOML: a key of 50 parts or more")
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers and nests too large for Python, too
        reason = str(error)[:LONGEST_REASON]
        raise ConfigError(f"{place}: not valid TOML: {reason}") from None
    for name, table in tables.items():
        if name not in TABLES:
            near = _nearest(name, list(TABLES))
            raise ConfigError(f"{place}: unknown table [{quoted_key(name)}]{near}")
        if not isinstance(table, dict):  # before --set changes a field of it
            raise ConfigError(f"{place}: {name}: want a table [{name}], got {quoted(table)}")
    return tables


def apply_change(tables: Tables, change: str) -> None:
    """Carry out one `table.field=value`; the value is TOML, and text may go without quotes."""
    key, equals, typed = change.partition("=")
    table, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        example = "want table.field=value, e.g. schedule.steps=500"
        raise ConfigError(f"--set {quoted(change)}: {example}")
    if table not in TABLES:
        near = _nearest(table, list(TABLES))
        raise ConfigError(f"--set {quoted(change)}: unknown table{near}")
    if len(change) > LONGEST_CHANGE:
        raise ConfigError(f"--set {quoted(change)}: more than {LONGEST_CHANGE:,} characters")
    try:
        read = tomllib.loads(f"value = {typed}")
    except (ValueError, RecursionError):
        read = {}
    # What is no TOML is text, and so is what sets more than this one value, in several lines.
    value = read["value"] if set(read) == {"value"} else typed.strip()
    tables.setdefault(table, {})[name] = value


def changed_lines(source: str, settings: Settings, changes: Sequence[str]) -> list[str]:
    """What `resolve` made of the changes, a line for each setting: `schedule.steps = 500`."""
    own, tables = read_tables(source), tables_of(settings)
    keys = [change.partition("=")[0].strip().partition(".")[::2] for change in changes]
    keys += [
        (table, name)
        for table, name in (("schedule", "warmup"), ("data", "tokenizer"))  # see `follow`
        if own.get(table, {}).get(name, tables[table][name]) != tables[table][name]
    ]
    if settings.model.init_from:
        keys.append(("data", "tokenizer"))
    unique = dict.fromkeys(keys)
    return [f"{table}.{name} = {_toml_value(tables[table][name])}" for table, name in unique]


def from_tables(name: str, tables: Tables) -> Settings:
    """Tables → checked settings. Raises ConfigError naming `table.field`."""
    for table in ("model", "data", "optimiser", "schedule"):
        if table not in tables:
            raise ConfigError(f"{name}: table [{table}] is missing")
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {quoted_key(table)}: want a table, got {quoted(values)}")
    return Settings(
        name=name,
        model=_model_settings(name, tables["model"]),
        data=_filled(name, "data", DataSettings, tables["data"]),
        optimiser=_filled(name, "optimiser", OptimiserSettings, tables["optimiser"]),
        schedule=_filled(name, "schedule", ScheduleSettings, tables["schedule"]),
        run=_filled(name, "run", RunSettings, tables.get("run", {})),
    )


def _model_settings(place: str, values: Mapping[str, Any]) -> ModelSettings:
    """The fields of every model, and apart from them the sizes, which model_factory.py checks."""
    own = {field.name for field in fields(ModelSettings)} - {"sizes"}
    of_all = {name: value for name, value in values.items() if name in own}
    sizes = {name: value for name, value in values.items() if name not in own}
    settings: ModelSettings = _filled(place, "model", ModelSettings, of_all)
    return replace(settings, sizes=sizes)


def _filled(place: str, table: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """`kind(**values)`, after every name and type was checked."""
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            near = _nearest(name, list(hints))
            raise ConfigError(f"{place}: {table}.{quoted_key(name)}: no such setting{near}")
    for each in fields(kind):
        needed = each.default is MISSING and each.default_factory is MISSING
        if needed and each.name not in values:
            raise ConfigError(f"{place}: {table}.{each.name} is missing")
    get = Fields(place, {f"{table}.{name}": value for name, value in values.items()})
    return kind(**{name: typed(get, f"{table}.{name}", hints[name]) for name in values})


def typed(get: Fields, key: str, kind: type) -> Any:
    """That field as a whole number of 0 or more, a number, text, or true or false.

    Raises ConfigError: of another type, too large, no finite number, text that is no Unicode.
    """
    if kind is int:
        most = SEED_LIMIT - 1 if key == "run.seed" else MAX_INTEGER
        return get.whole(key, least=0, most=most)
    if kind is float:
        return get.number(key)
    if kind is bool:
        return get.boolean(key)
    text = get.text(key)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        get.refuse(key, "text in UTF-8")
    return text


def quoted_key(name: str) -> str:
    """A name that is no setting, for an error."""
    return name if name.isidentifier() and len(name) <= 40 else quoted(name)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; have {', '.join(known)}"


def tables_of(settings: Settings) -> Tables:
    """The tables that `from_tables` makes these settings of, defaults written out."""
    tables = {name: dict(asdict(getattr(settings, name))) for name in TABLES if name != "model"}
    of_all = {name: value for name, value in vars(settings.model).items() if name != "sizes"}
    model = {**of_all, **settings.model.sizes}
    return {"model": model, **tables}


def to_toml(settings: Settings) -> str:
    """The settings as a TOML file that `resolve` reads back to the same."""
    blocks = []
    for name, table in tables_of(settings).items():
        lines = [f"{key} = {_toml_value(value)}" for key, value in table.items()]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _toml_value(value: object) -> str:
    """JSON writes texts, numbers and switches as TOML does, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
