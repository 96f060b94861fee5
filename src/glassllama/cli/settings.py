"""`/set NAME VALUE`: one sampling option from what was typed, checked as at the command line."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_type_hints

from glassllama.base.errors import GlassError
from glassllama.cli.options import SamplingOptions
from glassllama.generation import GenerationSettings

SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def option_names() -> list[str]:
    return [field.name for field in fields(SamplingOptions)]


def known(name: str) -> str:
    """`name`, if there is such an option. Raises GlassError."""
    if name not in option_names():
        raise GlassError(f"{name} is no option; have {' '.join(option_names())}")
    return name


def changed(sampling: SamplingOptions, name: str, typed: str) -> SamplingOptions:
    """`sampling` with that option set. Raises GlassError: no such option, no value it can have."""
    kind = get_type_hints(SamplingOptions)[known(name)]
    new = replace(sampling, **{name: read_value(name, kind, typed)})
    GenerationSettings(max_tokens=new.max_tokens)
    new.check()
    return new


def read_value(name: str, kind: Any, typed: str) -> Any:
    """What was typed, as a value of `kind`: a number, a switch, or texts between quotes."""
    choices = get_args(kind) or (kind,)
    if typed == "none" and NoneType in choices:
        return None
    wanted = "a number"
    enums = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, Enum)]
    try:
        if enums:
            wanted = " or ".join(choice.value for choice in enums[0])
            return enums[0](typed)
        if bool in choices:
            wanted = "on or off"
            return SWITCH[typed.lower()]
        if list[str] in choices:
            wanted = "texts, those with blanks between quotes"
            return shlex.split(typed) or [typed]
        if int in choices:
            wanted = "a whole number"
            return int(typed)
        return float(typed)
    except (ValueError, KeyError):
        came = typed or "nothing"
        raise GlassError(f"{name}: want {wanted}, got {came}") from None
