"""Documents with values of another type, sign, size or finiteness than their readers expect."""

from __future__ import annotations

import copy
import datetime
import json
import math
import random
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import handmade_gguf as hand

STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, -(2**31), 2**63,
    2**64, 10**400, 0.0, -0.0, -0.5, 1.5, 1e-300, 1e-45, 1e30, 1e300, math.nan, math.inf, -math.inf,
    "", " ", "7", "nan", "true", "text", "a\nb\r\x1b[0m\0", "é\u2028🙂", "x" * 100_000, "default",
    [], [1], [-1], [1.5], ["a"], [None], [[]], [[[1]]], [{}], ["x" * 10_000] * 3, list(range(2000)),
    {}, {"a": 1}, {"a": {"b": [1]}}, {"content": 5}, {"content": None}, {"x" * 10_000: 1},
]  # fmt: skip
DATES = [datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1), datetime.time(1, 2)]
HALF_CHARACTER = "\ud800"  # valid in JSON but not in UTF-8
MOST_CHANGES = 3
LARGEST = 1e308  # of floats


def mutant(seed: int, document: Mapping[str, Any], extra: list[Any]) -> dict[str, Any]:
    """The document with one to three changes; `extra` values are used in addition to STRANGE."""
    chance, changed = random.Random(seed), copy.deepcopy(dict(document))
    for _ in range(chance.randint(1, MOST_CHANGES)):
        places = list(all_places(changed))
        if not places:
            break
        # Top-level keys are chosen as often as all items of long lists together.
        top = [place for place in places if place[0] is changed]
        change(chance, *chance.choice(chance.choice([top, places]) or places), extra)
    return changed


def all_places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in the document with every one of its keys or positions."""
    keys = document if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from all_places(document[key])


def change(chance: random.Random, holder: Any, key: Any, extra: list[Any]) -> None:
    """Replace, remove, rename, duplicate, or multiply a value."""
    kind, value = chance.random(), holder[key]
    if kind < 0.1:
        del holder[key]
    elif kind < 0.2 and isinstance(holder, dict):
        holder[chance.choice([f"{key}s", str(key).upper(), "x" * 5000, "a\nb"])] = holder.pop(key)
    elif kind < 0.3 and isinstance(value, list):
        holder[key] = chance.choice([value + value, value[:1], [value], dict(enumerate(value))])
    elif kind < 0.5 and isinstance(value, int | float) and not isinstance(value, bool):
        real = float(max(-LARGEST, min(value, LARGEST)))
        holder[key] = chance.choice(
            [-value, value + 1, value * 1_000_000, value * 10**20, real, str(value)]
        )
    elif kind < 0.6:
        holder[key] = copy.deepcopy(holder[chance.choice(list(keys_of(holder)))])
    else:
        holder[key] = copy.deepcopy(chance.choice(STRANGE + extra))


def keys_of(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def as_json(document: Any) -> str:
    return json.dumps(document)  # writes NaN and Infinity, too, which readers may refuse


# --- GGUF -------------------------------------------------------------------------------------

I64, F64 = 11, 12


def gguf_value(value: Any) -> tuple[int, bytes]:
    """A metadata type and its bytes. A value of an unsupported type becomes text."""
    if isinstance(value, bool):
        return hand.BOOL, bytes([value])
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return (
            (hand.U64, struct.pack("<Q", value)) if value >= 0 else (I64, struct.pack("<q", value))
        )
    if isinstance(value, float):
        return F64, struct.pack("<d", value)
    if isinstance(value, list):
        return hand.ARRAY, gguf_array(value)
    return hand.STRING, hand.text(str(value).encode("utf-8", "replace"))


def gguf_array(values: list[Any]) -> bytes:
    """Items of one type unchanged; items of several types as text."""
    items = [gguf_value(value) for value in values]
    kinds = {kind for kind, _ in items}
    if len(kinds) > 1:
        items = [gguf_value(str(value)) for value in values]
    kind = items[0][0] if items else hand.U32
    return hand.array(kind, len(items), b"".join(payload for _, payload in items))


def gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """A complete file: this metadata, and float32 tensors."""
    pairs = [
        hand.pair(key.encode("utf-8", "replace"), *gguf_value(value))
        for key, value in metadata.items()
        if value is not None
    ]
    rows, data = [], b""
    for name, values in tensors.items():
        rows.append(hand.row(name, values.shape[::-1], hand.F32, len(data)))
        data += hand.padded(values.astype("<f4").tobytes(), 32)
    return hand.gguf(pairs, rows, data)


# --- TOML -------------------------------------------------------------------------------------


def as_toml(tables: Mapping[str, Any]) -> str:
    """Tables of values; values that are not tables precede them."""
    loose = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    lines = [f"{json.dumps(key)} = {toml_value(value)}" for key, value in loose.items()]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines.append(f"[{json.dumps(name)}]")
            lines += [f"{json.dumps(key)} = {toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    if isinstance(value, bool | str) or value is None:
        return json.dumps("" if value is None else value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        pairs = (f"{json.dumps(str(key))} = {toml_value(one)}" for key, one in value.items())
        return f"{{{', '.join(pairs)}}}"
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
