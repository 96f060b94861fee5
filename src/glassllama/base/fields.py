"""Typed access to values from untrusted files: JSON, TOML, GGUF metadata, saved states.

All such values are read through `Fields`. A value of the wrong type, sign or size, or a number that
is not finite, is an error with the file, the key, the value found and what was expected. No value
is converted silently: booleans and text are not accepted as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np

from glassllama.base.errors import ConfigError, GlassError, named, quoted

REQUIRED: Any = object()  # a key without a default
MAX_INTEGER = 2**31 - 1  # sizes and ids: compiled code has 32-bit indexes
MAX_NAME_LENGTH = 255  # of a file, on every usual system
MAX_NUMBER = float(np.finfo(np.float32).max)

T = TypeVar("T")
V = TypeVar("V")


class Fields:
    """The values of one object in a file. `source` is the file and object in error messages.

    Every method takes a key and a default. A missing key or a null value returns the default
    unchanged; without a default it is an error. Errors have the class `error`.
    """

    def __init__(
        self, source: str, values: Mapping[str, Any], error: type[GlassError] = ConfigError
    ) -> None:
        if not isinstance(values, Mapping):
            raise error(f"{source}: expected an object, got {quoted(values)}")
        self.source, self.values, self.error = source, values, error

    def integer(
        self, key: str, default: T = REQUIRED, *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int | T:
        """A whole number from `minimum` to `maximum`, inclusive."""

        def fits(value: Any) -> bool:
            return is_integer(value) and minimum <= value <= maximum

        return self._get(key, default, fits, f"a whole number from {minimum} to {maximum}", int)

    def number(
        self,
        key: str,
        default: T = REQUIRED,
        *,
        minimum: float = -math.inf,
        maximum: float = math.inf,
    ) -> float | T:
        """A number from `minimum` to `maximum` that is finite in float32."""
        limits = (
            f"from {minimum:g} to {maximum:g}" if maximum < math.inf else f"of at least {minimum:g}"
        )
        expected = "a finite number" if minimum == -math.inf else f"a finite number {limits}"

        def fits(value: Any) -> bool:
            return is_number(value) and bool(minimum <= value <= maximum)

        return self._get(key, default, fits, expected, float)

    def boolean(self, key: str, default: T = REQUIRED) -> bool | T:
        """true or false; numbers and text are refused."""
        return self._get(key, default, (bool, np.bool_), "true or false", bool)

    def text(self, key: str, default: T = REQUIRED) -> str | T:
        return self._get(key, default, (str,), "text", str)

    def items(self, key: str, default: T = REQUIRED, *, of: str = "any") -> Sequence[Any] | T:
        """A list. `of`: "any", "integer" (0 … MAX_INTEGER), "number" (finite) or "text" items.

        A one-dimensional NumPy array or an array of strings, as GGUF metadata has them, is
        returned as it is.
        """

        def fits(value: Any) -> bool:
            if isinstance(value, np.ndarray):
                return value.ndim == 1 and _array_holds(value, of)
            return _is_list(value) and _sequence_holds(value, of)

        expected = f"a list of {ITEM_NAMES[of]}" if of != "any" else "a list"
        return self._get(key, default, fits, expected, lambda value: value)

    def object(self, key: str, default: T = REQUIRED) -> Fields | T:
        """A nested object, as Fields."""
        inner = f"{self.source}: {named(key)}"
        return self._get(key, default, (object,), "", lambda v: Fields(inner, v, self.error))

    def refuse(self, key: str, expected: str) -> None:
        """Raise the error that the value of `key` is not `expected`."""
        raise self.error(
            f"{self.source}: {named(key)} must be {expected}, got {quoted(self.values.get(key))}"
        )

    def _get(
        self,
        key: str,
        default: T,
        fits: Callable[[Any], bool] | tuple[type, ...],
        expected: str,
        convert: Callable[[Any], V],
    ) -> V | T:
        """The value of a key, checked by `fits` (a function, or types), or the default."""
        value = self.values.get(key)
        if value is None:
            if default is REQUIRED:
                raise self.error(f"{self.source}: {named(key)} is missing")
            return default
        if not (isinstance(value, fits) if isinstance(fits, tuple) else fits(value)):
            self.refuse(key, expected)
        return convert(value)


def relative_path(name: object) -> str | None:
    """A file name from a file as a normalized relative path; None if it is outside the folder."""
    if not isinstance(name, str) or not name.isprintable() or set(name) & set("\\:"):
        return None
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        return None
    return path.as_posix() if max(map(len, path.parts)) <= MAX_NAME_LENGTH else None


def is_integer(value: object) -> bool:
    """Whether a value is a whole number; booleans are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number that is finite in float32; booleans are not."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(-MAX_NUMBER <= value <= MAX_NUMBER)  # False for NaN, too


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _sequence_holds(values: Sequence[Any], of: str) -> bool:
    """Arrays of strings have an attribute `of`, so that they need not be decoded."""
    return of in ("any", getattr(values, "of", None)) or all(map(ITEM_CHECKS[of], values))


def _array_holds(array: Any, of: str) -> bool:
    if of == "any":
        return True
    if of == "integer":
        return array.dtype.kind in "iu" and bool(np.all((array >= 0) & (array <= MAX_INTEGER)))
    if of == "number":
        return array.dtype.kind in "iuf" and bool(np.all(np.abs(array) <= MAX_NUMBER))
    return False


ITEM_NAMES = {"integer": "whole numbers", "number": "finite numbers", "text": "texts"}
ITEM_CHECKS = {
    "any": lambda item: True,
    "integer": lambda item: is_integer(item) and 0 <= item <= MAX_INTEGER,
    "number": is_number,
    "text": lambda item: isinstance(item, str),
}
