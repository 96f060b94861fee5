"""Typed access to values from files: accepted and refused values, and how errors quote them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glassllama.base.errors import ConfigError, FormatError, quoted
from glassllama.base.fields import Fields

STRANGE = [True, "3", [3], {"a": 3}, 10**400, -(10**400), math.nan, math.inf, 1e39, b"3", 3.5, -1]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: quoted(value)[:20])
def test_integer_refuses_other_types_and_numbers_outside_the_bounds(value: object) -> None:
    with pytest.raises(ConfigError, match=r"file: n must be a whole number from 1"):
        Fields("file", {"n": value}).integer("n")


@pytest.mark.parametrize("value", STRANGE[:-2], ids=lambda value: quoted(value)[:20])
def test_number_refuses_values_that_are_not_finite_in_float32(value: object) -> None:
    with pytest.raises(ConfigError, match=r"file: x must be a finite number, got"):
        Fields("file", {"x": value}).number("x")


def test_a_missing_key_and_null_give_the_default_or_an_error() -> None:
    get = Fields("file", {"null": None}, FormatError)
    assert get.integer("null", 7) == 7
    assert get.text("absent", None) is None
    with pytest.raises(FormatError, match="file: absent is missing"):
        get.number("absent")


def test_other_types_are_refused() -> None:
    get = Fields("file", {"flag": True, "text": "a", "list": [1, "a"], "none": [None]})
    assert get.boolean("flag") is True
    assert get.text("text") == "a"
    assert list(get.items("list")) == [1, "a"]
    for read in (
        lambda: get.boolean("text"),
        lambda: get.text("flag"),
        lambda: get.items("list", of="integer"),
        lambda: get.items("none", of="text"),
        lambda: get.object("list"),
        lambda: Fields("file", ["no", "object"]),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match="file"):
            read()


def test_numpy_arrays_are_lists_of_their_element_type() -> None:
    get = Fields(
        "file", {"ids": np.array([0, 5]), "signed": np.array([-1]), "nan": np.array([np.nan])}
    )
    assert get.items("ids", of="integer") is get.values["ids"]
    for key, kind, expected in (
        ("signed", "integer", "whole numbers"),
        ("nan", "number", "finite numbers"),
        ("ids", "text", "texts"),
    ):
        with pytest.raises(ConfigError, match=f"file: {key} must be a list of {expected}"):
            get.items(key, of=kind)


@pytest.mark.parametrize(
    "value", ["a" * 10**6, b"a" * 10**6, 10**5000, [10**5000] * 99, [["x" * 500] * 9] * 9],
    ids=["text", "bytes", "number", "numbers", "nested"],
)  # fmt: skip
def test_quoted_values_are_at_most_80_characters(value: object) -> None:
    assert len(quoted(value)) <= 80
