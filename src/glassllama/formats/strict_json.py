"""JSON from files that nobody vouches for: an object, each key once, or a FormatError."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from glassllama.base.errors import FormatError, quoted


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw` (UTF-8). Duplicate keys, NaN and non-objects are refused.

    Python's own parser keeps the last of two equal keys: two readers could see two files.
    """
    try:
        parsed = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_each_key_once, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8 and digit limits
        raise FormatError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise FormatError(f"{where}: expected a JSON object, got {quoted(parsed)}")
    return parsed


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {quoted(twice)} appears twice")
    for key in unique:
        key.encode("utf-8")  # half a surrogate pair is a UnicodeEncodeError, a ValueError
    return unique


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
