"""A preset or a TOML file, and what `--set` changes → Settings; and Settings → TOML again."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from glassllama.base.errors import ConfigError
from glassllama.train.settings import (
    LONGEST_SHOWN,
    WHOLE_LIMIT,
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

    Raises ConfigError: no such preset or file, bad TOML, unknown or mistyped fields.
    """
    tables = read_tables(source)
    for change in changes:
        apply_change(tables, change)
    name = source if source in preset_names() else Path(source).stem
    return from_tables(name, tables)


def read_tables(source: str) -> Tables:
    """The tables as they stand in the preset or file."""
    if source in preset_names():
        return parse(source, (PRESETS / f"{source}.toml").read_text(encoding="utf-8"))
    path = Path(source)
    if path.suffix != ".toml":
        raise ConfigError(
            f"{source}: no preset and no .toml file{_nearest(source, preset_names())}"
        )
    try:
        return parse(source, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 at byte {error.start}") from None


def parse(place: str, text: str) -> Tables:
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers and nests too large for Python, too
        raise ConfigError(f"{place}: not valid TOML: {error}") from None
    for name, table in tables.items():
        if name not in TABLES:
            raise ConfigError(f"{place}: unknown table [{name}]{_nearest(name, list(TABLES))}")
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: {name}: want a table [{name}], got {table!r}")
    return tables


def apply_change(tables: Tables, change: str) -> None:
    """Carry out one `table.field=value`; the value is TOML, and text may go without quotes."""
    key, equals, typed = change.partition("=")
    table, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise ConfigError(f"--set {change}: want table.field=value, e.g. schedule.steps=500")
    if table not in TABLES:
        raise ConfigError(f"--set {change}: unknown table{_nearest(table, list(TABLES))}")
    try:
        value = tomllib.loads(f"value = {typed}")["value"]
    except (ValueError, RecursionError):
        value = typed.strip()
    tables.setdefault(table, {})[name] = value


def changed_lines(settings: Settings, changes: Sequence[str]) -> list[str]:
    """What `resolve` made of the changes, a line for each setting: `schedule.steps = 500`."""
    tables = tables_of(settings)
    keys = dict.fromkeys(change.partition("=")[0].strip().partition(".")[::2] for change in changes)
    return [f"{table}.{name} = {_toml_value(tables[table][name])}" for table, name in keys]


def from_tables(name: str, tables: Tables) -> Settings:
    """Tables → checked settings. Raises ConfigError naming `table.field`."""
    for table in ("model", "data", "optimiser", "schedule"):
        if table not in tables:
            raise ConfigError(f"{name}: table [{table}] is missing")
    for table, values in tables.items():
        for field, value in values.items():
            require_sane(f"{table}.{field}", value)
    return Settings(
        name=name,
        model=_model_settings(tables["model"]),
        data=_filled("data", DataSettings, tables["data"]),
        optimiser=_filled("optimiser", OptimiserSettings, tables["optimiser"]),
        schedule=_filled("schedule", ScheduleSettings, tables["schedule"]),
        run=_filled("run", RunSettings, tables.get("run", {})),
    )


def require_sane(place: str, value: object) -> None:
    """Raise ConfigError: a whole number that 64 bits do not hold, text that is no Unicode."""
    if isinstance(value, int) and not -WHOLE_LIMIT < value < WHOLE_LIMIT:
        bits = value.bit_length()
        raise ConfigError(f"{place}: want a whole number below 2^63, got one of {bits} bits")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            bad = ascii(value[error.start])
            raise ConfigError(f"{place}: want text in UTF-8, got {bad} at {error.start}") from None


def _model_settings(values: Mapping[str, Any]) -> ModelSettings:
    """The fields of every model, and apart from them the sizes, which build.py checks."""
    of_all = {name: values[name] for name in ("kind", "dropout") if name in values}
    sizes = {name: value for name, value in values.items() if name not in of_all}
    settings: ModelSettings = _filled("model", ModelSettings, of_all)
    return replace(settings, sizes=sizes)


def _filled(table: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """`kind(**values)`, after every name and type was checked."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"{table}.{name}: no such setting{_nearest(name, list(hints))}")
        if not fits(value, hints[name]):
            raise ConfigError(f"{table}.{name}: want {WORDS[hints[name]]}, got {shown(value)}")
    for each in fields(kind):
        needed = each.default is MISSING and each.default_factory is MISSING
        if needed and each.name not in values:
            raise ConfigError(f"{table}.{each.name} is missing")
    return kind(**{name: hints[name](value) for name, value in values.items()})


WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def fits(value: object, kind: type) -> bool:
    """Whether a value of a TOML file can be a setting of that kind, one of WORDS."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def shown(value: object) -> str:
    """A value of a TOML file as errors show it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; have {', '.join(known)}"


def tables_of(settings: Settings) -> Tables:
    """The tables that `from_tables` makes these settings of, defaults written out."""
    tables = {name: dict(asdict(getattr(settings, name))) for name in TABLES if name != "model"}
    of_all = {"kind": settings.model.kind, "dropout": settings.model.dropout}
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
