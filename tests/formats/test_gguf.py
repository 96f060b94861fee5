"""The GGUF reader against files of the `gguf` package, and against files packed byte by byte."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import gguf as foreign
import numpy as np
import psutil
import pytest
from ml_dtypes import bfloat16

import handmade_gguf as hand
from glassllama.base.errors import FormatError
from glassllama.formats.blocks import TYPES, dequantize
from glassllama.formats.gguf import StringArray, open_gguf

DOCS = Path(__file__).parents[2] / "docs" / "formats" / "gguf.md"
RNG = np.random.default_rng(20240418)
PLAIN = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip
BLOCKS = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()


def finish(writer: foreign.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tensors(path: Path, tensors: dict[str, np.ndarray], alignment: int | None = None) -> Path:
    """Write with the gguf package; a tensor named after a block type contains raw blocks of that
    type."""
    writer = foreign.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, tensor in tensors.items():
        kind = foreign.GGMLQuantizationType[name] if name in (*BLOCKS, "BF16") else None
        writer.add_tensor(name, tensor, raw_dtype=kind)
    finish(writer)
    return path


def random_blocks(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    layout = TYPES[dtype]
    row_bytes = shape[-1] // layout.elements * layout.bytes
    return RNG.integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8)


def every_type() -> dict[str, np.ndarray]:
    tensors = {name: (9 * RNG.normal(size=(3, 5))).astype(kind) for name, kind in PLAIN.items()}
    tensors["BF16"] = RNG.normal(size=(2, 3, 4)).astype(bfloat16).view(np.uint8)
    return tensors | {name: random_blocks(name, (2, 3, 512)) for name in BLOCKS}


# ── metadata ──────────────────────────────────────────────────────────────────────────────────

NUMBERS = {
    "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1,
    "int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 1e-300,
    "bool": True,
}  # fmt: skip


def test_every_metadata_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = foreign.GGUFWriter(path, "llama")
    for kind, value in NUMBERS.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
        sub_type = foreign.GGUFValueType[kind.upper()]
        values = [value, 1, 0]
        writer.add_key_value(f"many.{kind}", values, foreign.GGUFValueType.ARRAY, sub_type)
    writer.add_string("a.string", "wörd 🦙\n\0")
    writer.add_array("many.strings", ["", "a", "é" * 300, "\0", " the"])
    writer.add_array("nested", [[1, 2], [3], [-4, 5, 6]])
    writer.add_array("nested.strings", [["a", "b"], ["c"]])
    finish(writer)
    metadata = open_gguf(path).metadata
    assert metadata["general.architecture"] == "llama"
    for kind, value in NUMBERS.items():
        assert metadata[f"a.{kind}"] == value
        assert type(metadata[f"a.{kind}"]) is type(value)
        many = metadata[f"many.{kind}"]
        assert many.tolist() == [value, 1, 0]
        assert many.dtype == np.dtype(kind)
        assert not many.flags.writeable
    assert metadata["a.string"] == "wörd 🦙\n\0"
    assert list(metadata["many.strings"]) == ["", "a", "é" * 300, "\0", " the"]
    assert [inner.tolist() for inner in metadata["nested"]] == [[1, 2], [3], [-4, 5, 6]]
    assert [list(inner) for inner in metadata["nested.strings"]] == [["a", "b"], ["c"]]


def test_string_arrays_behave_as_sequences(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    words = [f"wörd{i}" * (i % 4) for i in range(1000)]
    writer = foreign.GGUFWriter(path, "llama")
    writer.add_token_list(words)
    finish(writer)
    file = open_gguf(path)
    tokens = file.metadata["tokenizer.ggml.tokens"]
    file.close()  # metadata stays valid after closing
    assert len(tokens) == 1000
    assert list(tokens) == words
    assert (tokens[0], tokens[7], tokens[-1]) == (words[0], words[7], words[-1])
    assert tokens[5:900:7] == words[5:900:7]
    assert tokens[::-1] == words[::-1]
    assert "wörd1" in tokens
    assert tokens.index("wörd1") == 1
    with pytest.raises(IndexError):
        tokens[1000]


def test_empty_arrays(tmp_path: Path) -> None:
    kinds = {"numbers": hand.U32, "bools": hand.BOOL, "strings": hand.STRING, "arrays": hand.ARRAY}
    pairs = [hand.pair(k, hand.ARRAY, hand.array(kind, 0, b"")) for k, kind in kinds.items()]
    (tmp_path / "e.gguf").write_bytes(hand.gguf(pairs))
    metadata = open_gguf(tmp_path / "e.gguf").metadata
    assert {key: len(value) for key, value in metadata.items()} == dict.fromkeys(kinds, 0)


def test_a_string_that_is_not_utf8_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    strings = hand.array(hand.STRING, 2, hand.text("a") + hand.text(b"\xff"))
    (tmp_path / "u.gguf").write_bytes(hand.gguf([hand.pair("words", hand.ARRAY, strings)]))
    words = open_gguf(tmp_path / "u.gguf").metadata["words"]
    assert words[0] == "a"
    with pytest.raises(FormatError, match=r"u\.gguf: 'words': string 1 is not UTF-8"):
        words[1]


# ── tensors ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alignment", [None, 8, 32, 64, 128, 4096])
def test_every_tensor_type_at_any_alignment(tmp_path: Path, alignment: int | None) -> None:
    tensors = every_type()
    path = write_tensors(tmp_path / "t.gguf", tensors, alignment)
    file, reader = open_gguf(path), foreign.GGUFReader(path)
    assert file.names() == list(tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        info, ours = file.info(theirs.name), file.read(theirs.name)
        assert info.dtype == theirs.name
        assert info.path == str(path)
        assert info.shape == tuple(reversed(theirs.shape.tolist()))
        assert (info.offset, info.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert info.offset % (alignment or 32) == 0
        assert ours.tobytes() == tensors[theirs.name].tobytes() == theirs.data.tobytes()
        assert not ours.flags.writeable
        assert not ours.flags.owndata
        if theirs.name in BLOCKS:
            assert ours.shape == tensors[theirs.name].shape
            assert info.shape == (2, 3, 512)
        else:
            assert ours.shape == info.shape
            assert ours.dtype == PLAIN.get(theirs.name, bfloat16)


@pytest.mark.parametrize("rows", [slice(1, 3), slice(0, 0), slice(-2, None), slice(4), slice(9)])
def test_rows(tmp_path: Path, rows: slice) -> None:
    tensors = {
        "F32": RNG.normal(size=(5, 4)).astype(np.float32),
        "Q4_K": random_blocks("Q4_K", (5, 512)),
    }
    file = open_gguf(write_tensors(tmp_path / "r.gguf", tensors))
    for name, tensor in tensors.items():
        part = file.read(name, rows)
        assert np.array_equal(part, tensor[rows])
        assert part.size == 0 or not part.flags.owndata


def test_a_slice_of_a_single_row_of_blocks_is_an_error(tmp_path: Path) -> None:
    file = open_gguf(write_tensors(tmp_path / "r.gguf", {"Q8_0": random_blocks("Q8_0", (64,))}))
    with pytest.raises(FormatError, match="single row of blocks"):
        file.read("Q8_0", slice(0, 32))


def test_version_2(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "2.gguf", every_type())
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    assert open_gguf(path).names() == list(every_type())


def test_no_tensors(tmp_path: Path) -> None:
    assert open_gguf(write_tensors(tmp_path / "n.gguf", {})).names() == []
    bare = hand.gguf(alignment=1)
    assert len(bare) == 24
    (tmp_path / "bare.gguf").write_bytes(bare)
    file = open_gguf(tmp_path / "bare.gguf")
    assert (file.names(), dict(file.metadata)) == ([], {})


def test_zero_size_tensors_and_scalars(tmp_path: Path) -> None:
    rows = [
        hand.row("none", [4, 0]),
        hand.row("no blocks", [0, 3], hand.Q8_0),
        hand.row("one", []),
        hand.row("wide", [2**40, 0], hand.Q8_0, 32),
    ]
    (tmp_path / "z.gguf").write_bytes(hand.gguf((), rows, np.float32(7).tobytes()))
    file = open_gguf(tmp_path / "z.gguf")
    assert file.read("none").shape == file.info("none").shape == (0, 4)
    assert file.read("no blocks").shape == (3, 0)
    assert (file.read("one").shape, file.read("one").item()) == ((), 7)
    assert file.read("wide").shape == (0, 2**40 // 32 * 34)
    for name in file.names():
        info = file.info(name)
        assert dequantize(file.read(name), info.dtype, info.shape).shape == info.shape
        file.release_pages(name)
    with pytest.raises(FormatError, match="single number"):
        file.read("one", slice(0, 1))


def test_the_tensor_table_may_be_in_any_order(tmp_path: Path) -> None:
    rows = [hand.row("second", [8], offset=32), hand.row("first", [8], offset=0)]
    values = np.arange(16, dtype=np.float32)
    (tmp_path / "o.gguf").write_bytes(hand.gguf((), rows, values.tobytes()))
    file = open_gguf(tmp_path / "o.gguf")
    assert file.names() == ["second", "first"]
    assert file.read("second").tolist() == values[8:].tolist()


def test_close_and_arrays_that_are_still_used(tmp_path: Path) -> None:
    tensor = RNG.normal(size=(8, 8)).astype(np.float32)
    path = write_tensors(tmp_path / "c.gguf", {"F32": tensor})
    file = open_gguf(path)
    kept = file.read("F32")
    file.close()
    file.close()
    assert np.array_equal(kept, tensor)
    file.release_pages("F32")
    with pytest.raises(FormatError, match=r"c\.gguf: closed"):
        file.read("F32")


def test_an_unknown_name(tmp_path: Path) -> None:
    file = open_gguf(write_tensors(tmp_path / "n.gguf", every_type()))
    for call in (file.info, file.read, file.release_pages):
        with pytest.raises(FormatError, match="no tensor named 'F33'"):
            call("F33")


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system has no madvise")
def test_release_pages_frees_memory(tmp_path: Path) -> None:
    size = 32 * 2**20
    path = write_tensors(tmp_path / "d.gguf", {"I8": np.ones(size, np.int8), "F32": np.ones(4)})
    file, process = open_gguf(path), psutil.Process()
    before = process.memory_info().rss
    assert int(file.read("I8").sum(dtype=np.int64)) == size
    touched = process.memory_info().rss
    file.release_pages("I8")
    dropped = process.memory_info().rss
    assert touched - before > 0.9 * size
    assert dropped - before < 0.1 * size
    assert int(file.read("I8")[::4096].sum(dtype=np.int64)) == size // 4096  # pages are read again


def test_the_default_model(default_model: Path) -> None:
    file, reader = open_gguf(default_model), foreign.GGUFReader(default_model)
    assert file.names() == [tensor.name for tensor in reader.tensors]
    for key, value in file.metadata.items():
        theirs = reader.fields[key].contents()
        value = list(value) if isinstance(value, StringArray) else value
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs, key
    for theirs in reader.tensors[:12]:
        info = file.info(theirs.name)
        ours = dequantize(file.read(theirs.name), info.dtype, info.shape)
        assert np.array_equal(ours, foreign.quants.dequantize(theirs.data, theirs.tensor_type))
        file.release_pages(theirs.name)
    file.close()


def test_the_dump_in_the_docs(tmp_path: Path) -> None:
    """docs/formats/gguf.md shows a file of the gguf package byte by byte."""
    writer = foreign.GGUFWriter(tmp_path / "d.gguf", "llama")
    writer.add_array("words", ["a", "bc"])
    weights = np.tile(np.arange(-4, 4, 0.5, dtype=np.float32), (1, 2))
    q4_0 = foreign.GGMLQuantizationType.Q4_0
    writer.add_tensor("t", foreign.quants.quantize(weights, q4_0), raw_dtype=q4_0)
    finish(writer)
    shown = bytearray()
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([0-9a-f]{4})((?: [0-9a-f]{2})+)", line.replace("  ", " ", 1)):
            assert int(match[1], 16) == len(shown)
            shown += bytes.fromhex(match[2])
    assert shown == (tmp_path / "d.gguf").read_bytes()
    file = open_gguf(tmp_path / "d.gguf")
    assert np.array_equal(dequantize(file.read("t"), "Q4_0", file.info("t").shape), weights)


# ── split checkpoints ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Five tensors in three files, written by the gguf package."""
    writer = foreign.GGUFWriter(tmp_path / "s.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("llama.block_count", 7)
    for n in range(5):
        writer.add_tensor(f"t{n}", np.full((n + 1, 4), n, np.float32))
    finish(writer)
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_opens_the_whole_checkpoint(parts: list[Path], given: int) -> None:
    assert [path.name for path in parts] == [f"s-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    file = open_gguf(parts[given])
    assert file.names() == [f"t{n}" for n in range(5)]
    assert file.metadata["llama.block_count"] == 7
    for n in range(5):
        assert np.array_equal(file.read(f"t{n}"), np.full((n + 1, 4), n))
        assert file.info(f"t{n}").path == str(parts[n // 2])
        file.release_pages(f"t{n}")
    file.close()


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_the_error_names_a_missing_part(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    with pytest.raises(FormatError, match=rf"s-0000{missing + 1}-of-00003\.gguf: missing"):
        open_gguf(parts[missing - 1])


def test_parts_that_do_not_belong_together(parts: list[Path]) -> None:
    one, two, three = (path.read_bytes() for path in parts)
    parts[2].write_bytes(two)
    with pytest.raises(FormatError, match=r"00003-of-00003.gguf: split.no must be 2 .* got 1"):
        open_gguf(parts[0])
    other_name = three.replace(b"t4", b"t3")
    parts[2].write_bytes(other_name)
    with pytest.raises(FormatError, match=r"'t3' is in s-00002-of-00003.gguf already"):
        open_gguf(parts[0])
    parts[2].write_bytes(three)
    total = hand.text("split.tensors.count") + hand.u32(5)  # type 5 is int32
    parts[0].write_bytes(one.replace(total + hand.u32(5), total + hand.u32(6)))
    with pytest.raises(FormatError, match=r"split.tensors.count must be 5, .* got 6"):
        open_gguf(parts[1])


def test_a_part_that_was_renamed(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("llama.gguf"))
    with pytest.raises(FormatError, match=r"split.count says 3 parts, so the name must end in"):
        open_gguf(renamed)


def test_the_error_names_a_damaged_part(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-40])
    with pytest.raises(FormatError, match=r"s-00002-of-00003\.gguf: tensor 't3' ends at byte"):
        open_gguf(parts[0])


def test_split_keys_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "s.gguf").write_bytes(
        hand.gguf([hand.pair("split.count", hand.STRING, hand.text("3"))])
    )
    with pytest.raises(FormatError, match=r"split.count must be a whole number .*, got '3'"):
        open_gguf(tmp_path / "s.gguf")


def test_a_merged_checkpoint_with_zero_parts(tmp_path: Path) -> None:
    pairs = [hand.pair("split.count", hand.U32, hand.u32(0))]
    (tmp_path / "m.gguf").write_bytes(hand.gguf(pairs, [hand.row("x", [1])], bytes(4)))
    assert open_gguf(tmp_path / "m.gguf").names() == ["x"]
