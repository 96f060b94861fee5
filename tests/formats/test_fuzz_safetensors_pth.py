"""Damaged files: readers raise FormatError and no other exception.

GLASSLLAMA_FUZZ sets the number of inputs of each test; the nightly run takes 100,000.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glassllama.base.errors import FormatError
from glassllama.formats.pth import open_pth
from glassllama.formats.safetensors import open_safetensors

INPUTS = int(os.environ.get("GLASSLLAMA_FUZZ", "300"))
fuzzed = settings(
    max_examples=INPUTS,
    deadline=timedelta(seconds=1),
    derandomize="GLASSLLAMA_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)

Mutation = tuple[str, int, int, bytes]
JSON_PIECES = (
    b'" [] {} null -1 1e9 NaN 0 , : \\u0000 18446744073709551616 "U8" "dtype" [0,0]'.split()
)
NUMBERS = [b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**31), struct.pack("<Q", 2**63 - 1)]
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
NAMES = [b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_parameter\n", b"cos\nsystem\n", b"X\1\0\0\0a"]


def mutations(pieces: list[bytes]) -> st.SearchStrategy[list[Mutation]]:
    """A few edits: (what, where, how many bytes, which)."""
    content = st.sampled_from(pieces) | st.binary(min_size=1, max_size=8)
    edit = st.sampled_from(["set", "insert", "delete", "repeat", "cut"])
    one = st.tuples(edit, st.integers(0, 2**16), st.integers(1, 64), content)
    return st.lists(one, min_size=1, max_size=6)


def mutated(original: bytes, edits: list[Mutation]) -> bytes:
    changed = original
    for edit, where, count, content in edits:
        at = where % (len(changed) + 1)
        if edit == "set":
            changed = changed[:at] + content + changed[at + len(content) :]
        elif edit == "insert":
            changed = changed[:at] + content + changed[at:]
        elif edit == "delete":
            changed = changed[:at] + changed[at + count :]
        elif edit == "repeat":
            changed = changed[: at + count] + changed[at:]
        elif where % 8 == 0:  # truncation is rare, because little of the file remains
            changed = changed[:at]
    return changed


def write(content: bytes, path: Path) -> Path:
    """Overwrite in place: some file systems wait for the disk when a file is truncated first."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(content)
        file.truncate()
    return path


def check_safetensors(path: Path) -> None:
    with contextlib.suppress(FormatError):
        file = open_safetensors(path)
        for name in file.names():
            assert file.read(name).shape == file.info(name).shape
            file.release_pages(name)
        file.close()


def check_pth(path: Path) -> None:
    with contextlib.suppress(FormatError):
        file = open_pth(path)
        for name in file.names():
            assert file.read(name).shape == file.info(name).shape
            file.release_pages(name)
        file.verify()
        file.close()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file"


@pytest.fixture(scope="module")
def whole_safetensors(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.ones(0)}
    safetensors.torch.save_file(tensors, path, {"k": "v"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_pth() -> bytes:
    stream = io.BytesIO()
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "t": base.t(), "p": torch.nn.Parameter(torch.ones(2).half())}
    torch.save({"model": state, "epoch": 3, "sizes": [torch.Size([1]), (1.5, None)]}, stream)
    return stream.getvalue()


@fuzzed
@given(edits=mutations(NUMBERS))
def test_safetensors(edits: list[Mutation], whole_safetensors: bytes, scratch: Path) -> None:
    check_safetensors(write(mutated(whole_safetensors, edits), scratch))


@fuzzed
@given(edits=mutations(JSON_PIECES))
def test_safetensors_header(edits: list[Mutation], whole_safetensors: bytes, scratch: Path) -> None:
    """Damage to the header only; its length is correct."""
    nbytes = int.from_bytes(whole_safetensors[:8], "little")
    header = mutated(whole_safetensors[8 : 8 + nbytes], edits)
    data = whole_safetensors[8 + nbytes :]
    check_safetensors(write(struct.pack("<Q", len(header)) + header + data, scratch))


@fuzzed
@given(edits=mutations(NUMBERS))
def test_pth(edits: list[Mutation], whole_pth: bytes, scratch: Path) -> None:
    check_pth(write(mutated(whole_pth, edits), scratch))


def rezipped(whole: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The same zip with another pickle and the right checksum."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return stream.getvalue()


@fuzzed
@given(edits=mutations(OPCODES + NAMES + NUMBERS))
def test_pth_pickle(edits: list[Mutation], whole_pth: bytes, scratch: Path) -> None:
    check_pth(write(rezipped(whole_pth, lambda code: mutated(code, edits)), scratch))


@fuzzed
@given(pieces=st.lists(st.sampled_from(OPCODES + NAMES) | st.binary(max_size=3), max_size=60))
def test_pth_program(pieces: list[bytes], whole_pth: bytes, scratch: Path) -> None:
    program = b"\x80\x02" + b"".join(pieces) + b"."
    check_pth(write(rezipped(whole_pth, lambda _: program), scratch))
