"""Damaged GGUF files raise only FormatError, and within a second.

GLASSLLAMA_FUZZ=100000 tries that many damaged files (nightly; minutes), new ones on every run.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import gguf as foreign
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import handmade_gguf as hand
from glassllama.base.errors import FormatError
from glassllama.formats.blocks import SUPPORTED, dequantize
from glassllama.formats.gguf import open_gguf

EXAMPLES = int(os.environ.get("GLASSLLAMA_FUZZ", "300"))
LIMIT = timedelta(seconds=1)  # for one file
LONGEST_MESSAGE = 500
NIGHTLY = "GLASSLLAMA_FUZZ" in os.environ

SPECIAL_VALUES = [0, 1, 2, 7, 8, 9, 13, 31, 32, 33, 255, 2**16, 2**31, 2**32 - 1, 2**40, *hand.HUGE]

Damage = Callable[[bytes], bytes]


def real_file(path: Path) -> bytes:
    """A file with metadata and tensors of every kind, written by the gguf package."""
    writer = foreign.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_bool("yes", True)
    writer.add_token_list(["a", "bé", "", "def"])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_tensor("one", np.arange(3, dtype=np.float32))
    writer.add_tensor("half", np.ones((2, 2), np.float16))
    blocks = np.arange(2 * 144, dtype=np.uint16).astype(np.uint8).reshape(2, 144)
    writer.add_tensor("blocks", blocks, raw_dtype=foreign.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def handmade_file() -> bytes:
    """A short file, so that most damage hits a length or a type; split.count refers to other
    parts."""
    words = hand.array(hand.STRING, 2, hand.text("a") + hand.text("b"))
    bools = hand.array(hand.BOOL, 2, b"\0\1")
    pairs = [
        hand.pair("w", hand.ARRAY, hand.array(hand.ARRAY, 2, words + bools)),
        hand.pair("split.count", hand.U8, b"\1"),
    ]
    rows = [hand.row("a", [0, 2], hand.Q8_0), hand.row("b", [32, 1], hand.Q8_0)]
    return hand.gguf(pairs, rows, bytes(34))


def position(content: bytes, where: int) -> int:
    return where % (len(content) + 1)


def overwrite(where: int, new: bytes) -> Damage:
    def damage(content: bytes) -> bytes:
        at = position(content, where)
        return content[:at] + new + content[at + len(new) :]

    return damage


def insert(where: int, new: bytes) -> Damage:
    return lambda c: c[: position(c, where)] + new + c[position(c, where) :]


def cut_out(where: int, size: int) -> Damage:
    return lambda c: c[: position(c, where)] + c[position(c, where) + size :]


def repeat(where: int, size: int, times: int) -> Damage:
    def damage(content: bytes) -> bytes:
        at = position(content, where)
        return content[:at] + content[at : at + size] * times + content[at + size :]

    return damage


places = st.integers(0, 2**12)
telling = st.sampled_from(SPECIAL_VALUES)
news = st.one_of(
    st.binary(min_size=1, max_size=16),
    telling.map(lambda n: struct.pack("<Q", n)),
    telling.map(lambda n: struct.pack("<I", n % 2**32)),
    st.sampled_from([b"a", b"general.alignment", b"split.count", hand.text("a")]),
)
damages = st.lists(
    st.one_of(
        st.builds(overwrite, places, news),
        st.builds(insert, places, news),
        st.builds(cut_out, places, st.integers(1, 64)),
        st.builds(repeat, places, st.integers(1, 64), st.integers(2, 40)),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def originals(folder: Path) -> list[bytes]:
    return [real_file(folder / "real.gguf"), handmade_file()]


def problem(path: Path) -> str:
    """Open a file and read everything in it -> a description of what is wrong, or nothing."""
    try:
        use_all(path)
    except FormatError as error:
        return str(error)
    return ""


def use_all(path: Path) -> None:
    file = open_gguf(path)
    for value in file.metadata.values():
        repr(value)
        if not isinstance(value, str | int | float):
            list(value)
    for name in file.names():
        info, raw = file.info(name), file.read(name)
        if raw.ndim > 1:
            file.read(name, slice(0, 1))
        if info.dtype in SUPPORTED and raw.size:
            assert dequantize(raw, info.dtype, info.shape).shape == info.shape
        file.release_pages(name)
    file.close()


def test_the_original_files_are_valid(folder: Path, originals: list[bytes]) -> None:
    for content in originals:
        (folder / "whole.gguf").write_bytes(content)
        assert problem(folder / "whole.gguf") == ""


@settings(
    max_examples=EXAMPLES,
    deadline=LIMIT,
    derandomize=not NIGHTLY,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
@given(which=st.integers(0, 1), todo=damages)
def test_damaged_files(
    folder: Path, originals: list[bytes], which: int, todo: list[Damage]
) -> None:
    content = originals[which]
    for damage in todo:
        content = damage(content)
    path = folder / "damaged.gguf"
    path.write_bytes(content)
    message = problem(path)
    assert "\n" not in message
    assert len(message) < LONGEST_MESSAGE
