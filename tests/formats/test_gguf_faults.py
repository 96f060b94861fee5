"""Invalid GGUF files: an error of one line, within a time and memory limit."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import gguf as foreign
import numpy as np
import pytest

from glassllama.base.errors import FormatError
from glassllama.formats.gguf import open_gguf
from handmade_gguf import (
    ARRAY,
    BOOL,
    F32,
    HUGE,
    Q4_0,
    Q4_K,
    STRING,
    U8,
    U32,
    array,
    gguf,
    pair,
    row,
    text,
    u32,
    u64,
)
from processor_time import seconds

SECONDS, BYTES = 0.1, 64 * 2**20  # limits for one file
LONGEST_MESSAGE = 500


def nested(depth: int) -> bytes:
    return pair("deep", ARRAY, array(ARRAY, 1, b"") * (depth - 1) + array(U8, 1, b"\7"))


def alignment(value: int, kind: int = U32) -> bytes:
    return pair("general.alignment", kind, u32(value) if kind == U32 else text(str(value)))


one, two = row("a", [8]), row("b", [8], offset=32)
two_tensors = bytes(64)

FAULTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "one byte": (b"G", "is not GGUF: begins with b'G'"),
    "bad magic": (gguf(magic=b"GGML"), "begins with b'GGML' instead of b'GGUF'"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "version 1": (gguf(version=u32(1)), "GGUF version 1, .* versions 2 and 3"),
    "version 4": (gguf(version=u32(4)), "GGUF version 4, .* versions 2 and 3"),
    "big-endian": (gguf(version=b"\0\0\0\3"), "is big-endian, .* convert"),
    "only a version": (gguf()[:8], "the number of tensors needs 8 bytes at byte 8"),
    "key is not UTF-8": (gguf([pair(b"\xff\xfe", U8, b"\1")]), "metadata key 0 of 1 .* not UTF-8"),
    "value is not UTF-8": (gguf([pair("k", STRING, text(b"\xff"))]), "'k' at byte .* not UTF-8"),
    "key twice": (gguf([pair("k", U8, b"\1")] * 2), "metadata key 'k' comes twice"),
    "unknown value type": (gguf([pair("k", 13, b"\0" * 8)]), "'k' has the unknown .* type 13"),
    "unknown array type": (gguf([pair("k", ARRAY, array(99, 1, b"\0"))]), "metadata type 99"),
    "bool of 2": (gguf([pair("k", BOOL, b"\2")]), "'k' holds a bool of 2"),
    "bools of 255": (gguf([pair("k", ARRAY, array(BOOL, 2, b"\1\xff"))]), "a bool of 255"),
    "nested 9 deep": (gguf([nested(9)]), "'deep' nests arrays deeper than 8"),
    "nested 5,000 deep": (gguf([nested(5000)]), "'deep' nests arrays deeper than 8"),
    "70,000 arrays in one": (
        gguf([pair("k", ARRAY, array(ARRAY, 70_000, array(U8, 0, b"") * 70_000))]),
        "'k' is an array of 70000 arrays; at most 65536 are read",
    ),
    "70,000 pairs": (
        gguf([pair(f"{n:x}", U8, b"\1") for n in range(70_000)]), "70000 metadata pairs; .* 65536"
    ),
    "alignment 0": (gguf([alignment(0)]), "power of two and at least 8, got 0"),
    "alignment 4": (gguf([alignment(4)]), "power of two and at least 8, got 4"),
    "alignment 48": (gguf([alignment(48)]), "power of two and at least 8, got 48"),
    "alignment is text": (gguf([alignment(32, STRING)]), "a whole number .* got '32'"),
    "alignments": (
        gguf([pair("general.alignment", ARRAY, array(U32, 99, bytes(396)))]),
        "general.alignment must be a whole number .* got array",
    ),
    "alignment is a bool": (gguf([pair("general.alignment", BOOL, b"\1")]), "number .* got True"),
    "tensor twice": (gguf((), [one, row("a", [8], offset=32)], two_tensors), "'a' comes twice"),
    "tensor name is not UTF-8": (gguf((), [row(b"\xff", [8])], bytes(32)), "name 0 .* not UTF-8"),
    "five dimensions": (gguf((), [row("a", [1] * 5)], bytes(32)), "'a' has 5 dimensions"),
    "4 billion dimensions": (gguf((), [text("a") + u32(2**32 - 1) + bytes(12)]), "dimensions"),
    "Q4_0_4_4": (gguf((), [row("a", [32], 31)], bytes(18)), r"type 31 \(Q4_0_4_4\), .* have F32"),
    "IQ3_S": (gguf((), [row("a", [256], 21)], bytes(110)), r"type 21 \(IQ3_S\), .* have F32 F16"),
    "type removed": (gguf((), [row("a", [32], 4)], bytes(32)), r"type 4 \(unknown\), .* Q8_0"),
    "type 2^32 - 1": (gguf((), [row("a", [32], 2**32 - 1)], bytes(32)), r"type 4294967295"),
    "row of 33": (gguf((), [row("a", [33, 2], Q4_0)], bytes(64)), "rows of 33 .* multiple of 32"),
    "row of 128": (gguf((), [row("a", [128], Q4_K)], bytes(144)), "rows of 128 .* multiple of 256"),
    "scalar of blocks": (gguf((), [row("a", [], Q4_0)], bytes(32)), "rows of 1 .* of 32"),
    "offset 4": (gguf((), [row("a", [8], offset=4)], bytes(64)), "offset 4, no multiple of 32"),
    "overlap": (gguf((), [row("a", [16]), two], two_tensors), "'b' begins at .* inside .* 'a'"),
    "the same offset": (gguf((), [one, row("b", [8])], bytes(32)), "inside of tensor 'a'"),
    "hole": (gguf((), [one, row("b", [8], offset=64)], bytes(96)), "32 bytes between .* unused"),
    "gap at the start": (gguf((), [two], two_tensors), "between the header and tensor 'b'"),
    "out of the file": (gguf((), [one, two], bytes(63)), "'b' ends at byte 160, .* has 159"),
    "far out of the file": (gguf((), [row("a", [8], offset=2**50)], bytes(64)), "'a' ends at byte"),
    "trailing byte": (gguf((), [one, two], two_tensors + b"\0"), "1 bytes follow 160 bytes"),
    "trailing megabyte": (gguf((), [one], bytes(2**20)), "1048544 bytes follow 96"),
    "padding of ones": (gguf((), [row("a", [2])], b"\0" * 8 + b"\1" * 24), "padding may be zeros"),
    "bytes without a tensor": (gguf(data=b"\0"), "follow 24 bytes"),
}  # fmt: skip
for size in HUGE:
    FAULTS |= {
        f"{size} tensors": (gguf(n_rows=size), f"a table of {size} tensors needs"),
        f"{size} pairs": (gguf(n_pairs=size), f"a list of {size} metadata pairs needs"),
        f"key of {size} bytes": (gguf([u64(size) + bytes(13)]), "metadata key 0 of 1 needs"),
        f"text of {size} bytes": (gguf([pair("k", STRING, u64(size))]), f"'k' needs {size} bytes"),
        f"name of {size} bytes": (gguf((), [u64(size) + bytes(16)]), "name 0 of 1 tensors needs"),
        f"array of {size} arrays": (gguf([pair("k", ARRAY, array(ARRAY, size, b""))]), "'k' needs"),
        f"shape of {size}": (gguf((), [row("a", [size, 2])], bytes(32)), r"'a': shape"),
        f"empty shape of {size}": (gguf((), [row("a", [size, 0])], bytes(32)), r"'a': shape"),
        f"offset of {size // 32 * 32}": (
            gguf((), [row("a", [8], offset=size // 32 * 32)], bytes(32)),
            "'a' ends at byte",
        ),
        f"array of {size} words, the first of {size} bytes": (
            gguf([pair("k", ARRAY, array(STRING, 1, u64(size)))]),
            "'k': a string of 1 runs past the end",
        ),
    }
for count in (2**40, *HUGE):
    for name, kind in (("bytes", U8), ("bools", BOOL), ("words", STRING), ("numbers", U32)):
        content = gguf([pair("some.key", ARRAY, array(kind, count, b""))], alignment=1)
        FAULTS[f"array of {count} {name}"] = content.ljust(113, b"\0"), "'some.key' needs"


@pytest.mark.parametrize(("content", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_fault(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "f.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message) as caught:
            open_gguf(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= BYTES
    error_text = str(caught.value)
    assert error_text.startswith(f"{path}: ")
    assert "\n" not in error_text
    assert len(error_text) < LONGEST_MESSAGE
    assert seconds(lambda: refuse(path), enough=SECONDS) <= SECONDS


def refuse(path: Path) -> None:
    with pytest.raises(FormatError):
        open_gguf(path)


@pytest.mark.parametrize("name", ["missing.gguf", "."])
def test_paths_that_are_not_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError):
        open_gguf(tmp_path / name)


def small_real_file(path: Path) -> bytes:
    """A file with every kind of content, written by the gguf package, ending with its last
    tensor."""
    writer = foreign.GGUFWriter(path, "llama")
    writer.add_bool("yes", True)
    writer.add_float64("f", 0.25)
    writer.add_token_list(["a", "bc", "", "def"])
    writer.add_token_scores([0.0, -1.0, -2.0, -3.0])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_tensor("short", np.arange(3, dtype=np.float32))
    blocks = np.arange(16 * 18, dtype=np.uint16).astype(np.uint8).reshape(2, -1)
    writer.add_tensor("blocks", blocks, raw_dtype=foreign.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    content = small_real_file(tmp_path / "whole.gguf")
    last = open_gguf(tmp_path / "whole.gguf").info("blocks")
    assert last.offset + last.nbytes == len(content)  # so that no truncation removes only padding
    path = tmp_path / "cut.gguf"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError) as caught:
            open_gguf(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_the_last_padding_may_be_missing(tmp_path: Path) -> None:
    """Not every writer pads the last tensor; no tensor data is missing."""
    content = gguf((), [row("a", [2], F32)], np.float32([1, 2]).tobytes().ljust(32, b"\0"))
    for length in range(len(content) - 24, len(content) + 1):
        (tmp_path / "p.gguf").write_bytes(content[:length])
        assert open_gguf(tmp_path / "p.gguf").read("a").tolist() == [1, 2]


def test_nested_as_deep_as_allowed(tmp_path: Path) -> None:
    (tmp_path / "n.gguf").write_bytes(gguf([nested(8)]))
    value = open_gguf(tmp_path / "n.gguf").metadata["deep"]
    for _ in range(7):
        (value,) = value
    assert value.tolist() == [7]
