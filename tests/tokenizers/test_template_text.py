"""The origin of characters through every operation on texts of a template."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassllama.tokenizers.chat_template import (
    TemplateText,
    from_template,
    joined,
    origin_of,
    tracked,
)

Pairs = list[tuple[str, int]]  # each character with its origin

TEXTS = st.lists(st.tuples(st.sampled_from("ab <\n"), st.integers(0, 1)), max_size=12)
NEEDLES = st.text("ab <\n", min_size=1, max_size=3)


def text_of(pairs: Pairs) -> TemplateText:
    return TemplateText("".join(c for c, _ in pairs), bytes(own for _, own in pairs))


def pairs_of(text: str) -> Pairs:
    return list(zip(str.__str__(text), origin_of(text), strict=True))


def by_definition(pairs: Pairs, name: str, *arguments: Any) -> list[Pairs]:
    """The characters of each part, by definition."""
    text = "".join(c for c, _ in pairs)
    if name in ("strip", "lstrip", "rstrip"):
        [chars] = arguments
        start, end = 0, len(text)
        while name != "rstrip" and start < end and (chars or " \n").find(text[start]) >= 0:
            start += 1
        while name != "lstrip" and end > start and (chars or " \n").find(text[end - 1]) >= 0:
            end -= 1
        return [pairs[start:end]]
    if name == "splitlines":
        return [pairs[m.start() : m.end()] for m in re.finditer(r"[^\n]*\n|[^\n]+$", text)]
    [separator] = arguments
    if separator is None:
        return [pairs[m.start() : m.end()] for m in re.finditer(r"\S+", text)]
    cuts = [m.span() for m in re.finditer(re.escape(separator), text)]
    ends, starts = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
    return [pairs[end:start] for end, start in zip(ends, starts, strict=True)]


@given(TEXTS, st.one_of(st.none(), NEEDLES))
def test_parts_keep_the_origin_of_their_characters(pairs: Pairs, needle: str | None) -> None:
    text = text_of(pairs)
    for name in ("strip", "lstrip", "rstrip"):
        assert [pairs_of(getattr(text, name)(needle))] == by_definition(pairs, name, needle)
    assert [*map(pairs_of, text.split(needle))] == by_definition(pairs, "split", needle)
    lines = [*map(pairs_of, text.splitlines(True))]
    assert lines == by_definition(pairs, "splitlines")
    assert [line[: -1 if line[-1][0] == "\n" else None] for line in lines] == [
        *map(pairs_of, text.splitlines())
    ]


@given(TEXTS, NEEDLES, st.integers(-1, 3))
def test_splitting_at_a_text_keeps_the_origin(pairs: Pairs, needle: str, count: int) -> None:
    text, plain = text_of(pairs), "".join(c for c, _ in pairs)
    for name in ("split", "rsplit"):
        parts = getattr(text, name)(needle, count)
        assert parts == getattr(plain, name)(needle, count)
        assert pairs_of(parts[0]) == pairs[: len(parts[0])]
        assert pairs_of(parts[-1]) == pairs[len(pairs) - len(parts[-1]) :]
    for name in ("split", "rsplit"):
        parts = getattr(text, name)(None, count)
        assert parts == getattr(plain, name)(None, count)
        at = 0
        for part in parts:
            at = plain.index(part, at)
            assert pairs_of(part) == pairs[at : at + len(part)]
            at += len(part)
    for name in ("partition", "rpartition"):
        assert [*map(str.__str__, getattr(text, name)(needle))] == [*getattr(plain, name)(needle)]
        assert [*chain(*map(pairs_of, getattr(text, name)(needle)))] == pairs
    for name in ("removeprefix", "removesuffix"):
        assert str.__str__(getattr(text, name)(needle)) == getattr(plain, name)(needle)


@given(TEXTS, st.text("ab <\n", max_size=2), TEXTS, st.integers(-1, 4))
def test_replacing_keeps_both_origins(pairs: Pairs, old: str, new: Pairs, count: int) -> None:
    text, plain = text_of(pairs), "".join(c for c, _ in pairs)
    made = text.replace(old, text_of(new), count)
    assert str.__str__(made) == plain.replace(old, "".join(c for c, _ in new), count)
    expected: Pairs = []
    at = done = 0
    while at <= len(pairs):
        if plain.startswith(old, at) and done != count:
            expected += new
            done += 1
            if old:
                at += len(old)
                continue
        expected += pairs[at : at + 1]
        at += 1
    assert pairs_of(made) == expected


@given(TEXTS, TEXTS, TEXTS, st.integers(-3, 3), st.integers(-3, 3))
def test_concatenation_and_slices(
    one: Pairs, two: Pairs, three: Pairs, start: int, step: int
) -> None:
    first, second, third = text_of(one), text_of(two), text_of(three)
    plain = str.__str__(second)
    assert pairs_of(first + second) == one + two
    assert pairs_of(first + plain) == one + pairs_of(plain)
    assert pairs_of(plain + first) == pairs_of(plain) + one
    assert pairs_of(first * 2) == pairs_of(2 * first) == one * 2
    assert pairs_of(first.join([second, plain, third])) == [
        *two, *one, *pairs_of(plain), *one, *three,
    ]  # fmt: skip
    assert pairs_of(first[start :: step or 1]) == one[start :: step or 1]
    assert [*chain(*map(pairs_of, first))] == one
    assert [*chain(*map(pairs_of, reversed(first)))] == one[::-1]
    assert pairs_of(str(first)) == one
    assert first.masked("?") == "".join(c if own else "?" for c, own in one)


@pytest.mark.parametrize("name", ["upper", "lower", "title", "capitalize", "swapcase"])
@given(st.lists(st.tuples(st.sampled_from("aBßΣİŉ ǆ"), st.integers(0, 1)), max_size=6))
def test_upper_and_lower_case(name: str, pairs: Pairs) -> None:
    text = text_of(pairs)
    made = getattr(text, name)()
    assert str.__str__(made) == getattr(str.__str__(text), name)()
    if len(made) == len(text):
        assert origin_of(made) == origin_of(text)
    else:
        assert not any(origin_of(made)) or all(origin_of(text))


def test_undefined_operations_lose_the_origin() -> None:
    text = from_template("<|im_end|>")
    for made in (text.zfill(20), text.center(20), text.expandtabs(), f"{text}!", "".join([text])):
        assert not any(origin_of(made))
    assert not any(origin_of("ordinary"))
    assert not any(tracked("ordinary").origin)
    assert origin_of(joined(["<", text])) == b"\0" + b"\1" * 10
