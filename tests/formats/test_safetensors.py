"""safetensors: files of other writers are read bit for bit; clean errors."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from glassllama.base.errors import FormatError
from glassllama.formats.safetensors import open_safetensors
from processor_time import seconds

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "formats" / "safetensors.md"
TIME_LIMIT = 0.010  # seconds


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, so that NaN payloads and subnormal numbers are among the values."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8).view(dtype).reshape(shape)


def handmade(header: dict[str, Any] | str | bytes, data: bytes = b"") -> bytes:
    raw = json.dumps(header) if isinstance(header, dict) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: int, end: int, *shape: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


def assert_clean_error(path: Path, match: str) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        open_safetensors(path)
    message = str(caught.value)
    assert str(path.parent) in message
    assert "\n" not in message
    assert len(message) < 400 + 2 * len(str(path))


# ---- good files ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0, 4), (2, 3, 1, 5)])
def test_every_dtype_bit_for_bit(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    written = random_tensor(DTYPES[dtype], *shape)
    safetensors.torch.save_file({"x": written, "pad": torch.ones(1)}, tmp_path / "a.safetensors")
    file = open_safetensors(tmp_path / "a.safetensors")
    info, array = file.info("x"), file.read("x")
    assert (info.dtype, info.shape, array.shape) == (dtype, shape, shape)
    assert array.tobytes() == raw_bytes(written)
    assert info.nbytes == len(raw_bytes(written))
    assert Path(info.path).read_bytes()[info.offset :][: info.nbytes] == array.tobytes()
    assert not array.flags.writeable


def test_values_as_numpy_reads_them(tmp_path: Path) -> None:
    written = {
        "half": np.linspace(-2, 2, 7, dtype=np.float16),
        "flags": np.array([[True], [False]]),
        "counts": np.arange(-3, 9, dtype=np.int64).reshape(3, 4),
    }
    safetensors.numpy.save_file(written, tmp_path / "a.safetensors", {"format": "np", "ü": "\n"})
    file = open_safetensors(tmp_path / "a.safetensors")
    assert sorted(file.names()) == sorted(written)
    assert file.metadata == {"format": "np", "ü": "\n"}
    for name, array in written.items():
        np.testing.assert_array_equal(file.read(name), array, strict=True)
    for rows in (slice(1, 2), slice(None, None, 2), slice(5, 9), slice(-1, None)):
        np.testing.assert_array_equal(file.read("counts", rows), written["counts"][rows])


def test_arrays_stay_valid_after_close_and_release_pages(tmp_path: Path) -> None:
    written = random_tensor(torch.bfloat16, 300, 70)
    safetensors.torch.save_file({"x": written}, tmp_path / "a.safetensors")
    file = open_safetensors(tmp_path / "a.safetensors")
    array = file.read("x")
    before = array.tobytes()
    file.release_pages("x")
    assert array.tobytes() == before
    file.close()
    assert array.tobytes() == raw_bytes(written)


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(
    sys.platform != "linux", reason="release_pages() and resident memory: Linux only"
)
def test_only_read_tensors_take_memory_and_release_pages_frees_it(tmp_path: Path) -> None:
    megabytes = 64
    big = torch.zeros(megabytes, 2**20, dtype=torch.uint8)
    safetensors.torch.save_file({"x": big}, tmp_path / "a.safetensors")
    del big
    file = open_safetensors(tmp_path / "a.safetensors")
    before = resident()
    assert not file.read("x", slice(10, 12)).any()
    assert resident() - before < 16 * 2**20
    assert file.read("x").max() == 0
    assert resident() - before > (megabytes - 8) * 2**20
    file.release_pages("x")
    assert resident() - before < 16 * 2**20


def test_unaligned_elements_are_returned_aligned(write: Callable[[bytes], Path]) -> None:
    data = struct.pack("<B3f", 7, 1.5, -2.0, 0.25)
    header = json.dumps({"b": entry(0, 1, 1), "f": entry(1, 13, 3, dtype="F32")})
    for padding in range(8):  # trailing spaces are part of the format
        array = open_safetensors(write(handmade(header + " " * padding, data))).read("f")
        assert array.flags.aligned
        assert array.tolist() == [1.5, -2.0, 0.25]


def test_the_file_in_the_documentation(write: Callable[[bytes], Path]) -> None:
    dump = PAGE.read_text().split("```hex\n")[1].split("```")[0]
    content = b""
    for line in dump.splitlines():
        assert int(line[:3], 16) == len(content)
        content += bytes.fromhex(line[5:52])
    file = open_safetensors(write(content))
    assert file.read("w").astype(float).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert file.read("n").tolist() == [7]
    assert safetensors.torch.load(content)["w"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_file_without_tensors(write: Callable[[bytes], Path]) -> None:
    assert open_safetensors(write(handmade("{}"))).names() == []
    only_metadata = handmade({"__metadata__": {"a": "b"}})
    assert open_safetensors(write(only_metadata)).metadata == {"a": "b"}


def test_unknown_tensor_and_rows_of_a_number(write: Callable[[bytes], Path]) -> None:
    file = open_safetensors(write(handmade({"x": entry(0, 1)}, b"\x05")))
    with pytest.raises(FormatError, match="no tensor named 'y'"):
        file.read("y")
    with pytest.raises(FormatError, match="single number"):
        file.read("x", slice(0, 1))
    assert file.read("x") == 5


# ---- shards ----


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Llama, saved by transformers in several shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, head_dim=6,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("shards")
    model.save_pretrained(folder, max_shard_size="10KB")
    return folder, model.state_dict()


def copy_folder(source: Path, target: Path) -> Path:
    """Copy the folder -> the index.json of the copy."""
    for path in source.glob("model*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target / "model.safetensors.index.json"


def test_shards_of_transformers(shards: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, written = shards
    file = open_safetensors(folder / "model.safetensors.index.json")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    assert sorted(file.names()) == sorted(written)
    assert len({file.info(name).path for name in file.names()}) >= 3
    assert file.metadata == {"format": "pt"}
    for name, tensor in written.items():
        assert file.read(name).tobytes() == raw_bytes(tensor)
        file.release_pages(name)
    file.close()


def edit_index(index: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


BAD_SHARDS = [
    "../model.safetensors",
    "/etc/passwd",
    "a/../../b.safetensors",
    ".",
    "/",
    "a" * 256,
    "..",
    "",
    "a\\b",
    "C:x",
    "\0",
]


@pytest.mark.parametrize("shard", [*BAD_SHARDS, None, 3, ["x"]])
def test_an_index_with_paths_outside_its_folder(shards: Any, tmp_path: Path, shard: object) -> None:
    index = copy_folder(shards[0], tmp_path)
    edit_index(index, lambda weights: weights.update({"model.norm.weight": shard}))
    assert_clean_error(index, "must be the name of a file beside or below the index")


def test_shards_below_the_index(shards: Any, tmp_path: Path) -> None:
    index = copy_folder(shards[0], tmp_path)
    (tmp_path / "shards").mkdir()
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.rename(tmp_path / "shards" / shard.name)
    here, below = open_safetensors(shards[0] / index.name), "./shards//{}"
    edit_index(index, lambda w: w.update({name: below.format(w[name]) for name in w}))
    there = open_safetensors(index)
    assert all((here.read(name) == there.read(name)).all() for name in here.names())
    there.close()
    edit_index(index, lambda w: w.update({"model.norm.weight": min(w.values())}))
    assert_clean_error(index, "'model.norm.weight' is in shards/model-0.*, expected shards/model-")


def test_index_names_a_missing_shard(shards: Any, tmp_path: Path) -> None:
    index = copy_folder(shards[0], tmp_path)
    sorted(tmp_path.glob("model-*"))[1].unlink()
    assert_clean_error(index, "model-00002-of-.*: no such file")


def test_index_names_a_missing_tensor(shards: Any, tmp_path: Path) -> None:
    index = copy_folder(shards[0], tmp_path)
    edit_index(index, lambda weights: weights.update(ghost=min(weights.values())))
    assert_clean_error(index, "'ghost' is not in model-00001")


def test_a_tensor_in_another_shard_than_the_index_says(shards: Any, tmp_path: Path) -> None:
    index = copy_folder(shards[0], tmp_path)

    def name_a_path_outside(weights: dict[str, str]) -> None:
        first, last = min(weights.values()), max(weights.values())
        weights[next(name for name, shard in weights.items() if shard == first)] = last

    edit_index(index, name_a_path_outside)
    assert_clean_error(index, r"is in model-00001.*, expected model-")


def test_a_tensor_in_two_shards(shards: Any, tmp_path: Path) -> None:
    index = copy_folder(shards[0], tmp_path)
    first, *_, last = sorted(tmp_path.glob("model-*"))
    tensors = safetensors.torch.load_file(last) | safetensors.torch.load_file(first)
    safetensors.torch.save_file(tensors, last)
    assert_clean_error(index, "is in model-00001.* and in model-")


def test_a_tensor_that_the_index_leaves_out_is_listed(shards: Any, tmp_path: Path) -> None:
    """Whether it is needed is decided by the architecture, which names all unexpected tensors."""
    index = copy_folder(shards[0], tmp_path)
    edit_index(index, lambda weights: weights.pop("model.norm.weight"))
    assert "model.norm.weight" in open_safetensors(index).names()


def test_a_shard_is_damaged(shards: Any, tmp_path: Path) -> None:
    index = copy_folder(shards[0], tmp_path)
    shard = max(tmp_path.glob("model-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_clean_error(index, rf"{shard.name}: truncated")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "empty"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": []}', "expected a weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' appears twice"),
        ("{", "not valid JSON"),
    ],
)
def test_files_that_are_not_an_index(tmp_path: Path, content: str, match: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    assert_clean_error(index, match)


# ---- faults of one file (L2) ----

A, B = entry(0, 4, 4), entry(4, 8, 2, 2)
HUGE = 2**62
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "seven bytes": (b"\0" * 7, "begins with 8 bytes"),
    "empty header": (struct.pack("<Q", 0) + b"{}", "header length 0"),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", "header length 100"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "header length"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", "header length"),
    "header too short": (struct.pack("<Q", 20) + handmade({"a": A}, b"1234")[8:], "JSON"),
    "not JSON": (handmade("{not json}"), "not valid JSON"),
    "text after the JSON": (handmade("{}x"), "not valid JSON"),
    "not UTF-8": (handmade(b'{"\xff": 1}'), "not valid JSON"),
    "half a surrogate pair": (handmade('{"\\ud800": 1}'), "not valid JSON"),
    "not an object": (handmade("[1, 2]"), "must begin with"),
    "space before the object": (handmade(" {}"), "must begin with"),
    "NaN": (handmade('{"a": NaN}'), "NaN is not JSON"),
    "nested 100,000 deep": (handmade('{"a": ' + "[" * 100_000), "not valid JSON"),
    "number of 10,000 digits": (handmade('{"a": ' + "9" * 10_000 + "}"), "not valid JSON"),
    "duplicate tensor": (
        handmade(f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}', b"1234"),
        "'a' appears twice",
    ),
    "duplicate field": (
        handmade('{"a": {"dtype": "U8", "dtype": "I8", "shape": []}}'),
        "'dtype' appears twice",
    ),
    "duplicate metadata": (handmade('{"__metadata__": {"k": "1", "k": "2"}}'), "'k' appears twice"),
    "metadata is not an object": (handmade({"__metadata__": "text"}), "__metadata__ must map"),
    "metadata contains a number": (handmade({"__metadata__": {"a": 1}}), "__metadata__ must map"),
    "entry is not an object": (handmade({"a": [1]}), "tensor 'a': expected"),
    "entry lacks a field": (handmade({"a": {"dtype": "U8", "shape": [1]}}), "tensor 'a': expected"),
    "entry has a field too many": (handmade({"a": {**A, "more": 1}}, b"1234"), "'a': expected"),
    "dtype float8": (handmade({"a": {**A, "dtype": "F8_E4M3"}}, b"1234"), "'F8_E4M3' is not supp"),
    "dtype unknown": (handmade({"a": {**A, "dtype": "f32"}}, b"1234"), "'f32' is not supported"),
    "dtype a list": (handmade({"a": {**A, "dtype": ["U8"]}}, b"1234"), "is not supported"),
    "shape a number": (handmade({"a": {**A, "shape": 4}}, b"1234"), "shape 4"),
    "shape negative": (handmade({"a": {**A, "shape": [-2, -2]}}, b"1234"), "whole numbers"),
    "shape a fraction": (handmade({"a": {**A, "shape": [4.0]}}, b"1234"), "whole numbers"),
    "shape a boolean": (handmade({"a": {**A, "shape": [True, 4]}}, b"1234"), "whole numbers"),
    "shape overflows": (handmade({"a": entry(0, 4, HUGE, HUGE)}, b"1234"), "2.63 bytes"),
    "shape overflows to zero": (handmade({"a": entry(0, 0, HUGE, 4)}), "2.63 bytes"),
    "shape overflows, empty": (handmade({"a": entry(0, 0, 0, HUGE, HUGE)}), "2.63 bytes"),
    "shape of 2^64": (handmade({"a": entry(0, 4, 2**64)}, b"1234"), "whole numbers"),
    "shape of 33 axes": (handmade({"a": entry(0, 1, *[1] * 33)}, b"1"), "at most 32"),
    "shape larger than its bytes": (handmade({"a": entry(0, 4, 5)}, b"1234"), "is 5 bytes"),
    "shape smaller than its bytes": (handmade({"a": entry(0, 4, 3)}, b"1234"), "is 3 bytes"),
    "offsets three": (handmade({"a": {**A, "data_offsets": [0, 4, 8]}}, b"1234"), "data_offsets"),
    "offsets text": (handmade({"a": {**A, "data_offsets": "04"}}, b"1234"), "data_offsets"),
    "offsets fractions": (handmade({"a": {**A, "data_offsets": [0.0, 4.0]}}, b"1234"), "data_off"),
    "offsets backwards": (handmade({"a": entry(4, 0, 4)}, b"1234"), "data_offsets"),
    "offsets negative": (handmade({"a": entry(-4, 0, 4)}, b"1234"), "data_offsets"),
    "offsets outside": (handmade({"a": A, "b": entry(2**40, 2**40 + 4, 4)}, b"1234"), "hole"),
    "overlap": (handmade({"a": A, "b": entry(2, 6, 4)}, b"123456"), "'b' overlaps"),
    "the same bytes twice": (handmade({"a": A, "b": A}, b"1234"), "'b' overlaps"),
    "hole": (handmade({"a": A, "b": entry(5, 9, 4)}, b"123456789"), "'b' leaves a hole"),
    "gap at the beginning": (handmade({"b": B}, b"12345678"), "'b' leaves a hole"),
    "trailing byte": (handmade({"a": A}, b"12345"), "trailing bytes"),
    "last byte missing": (handmade({"a": A, "b": B}, b"1234567"), "truncated"),
    "name of a megabyte": (handmade({"\n" * 2**20: {**A, "dtype": "X"}}, b"1234"), "not supported"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, write: Callable[[bytes], Path]) -> None:
    content, match = FAULTS[fault]
    assert_clean_error(write(content), match)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_within_the_time_limit(fault: str, write: Callable[[bytes], Path]) -> None:
    path = write(FAULTS[fault][0])

    def attempt() -> None:
        with pytest.raises(FormatError):
            open_safetensors(path)

    limit = TIME_LIMIT * (10 if path.stat().st_size > 2**20 else 1)
    assert seconds(attempt, enough=limit) < limit


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert_clean_error(tmp_path / "no.safetensors", "no such file")
    assert_clean_error(tmp_path / "no.index.json", "no such file")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_clean_error(folder, "is a folder")


def test_truncated_at_every_byte(tmp_path: Path, write: Callable[[bytes], Path]) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, tmp_path / "whole", {"k": "v"})
    whole = (tmp_path / "whole").read_bytes()
    assert open_safetensors(write(whole)).names() != []
    for length in range(len(whole)):
        assert_clean_error(write(whole[:length]), "expected|empty|begins with|truncated|hole")
