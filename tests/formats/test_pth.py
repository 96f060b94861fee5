"""torch.save files: read like torch reads them, never executed, clean errors."""

from __future__ import annotations

import ast
import copyreg
import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glassllama.formats
from glassllama.base.errors import FormatError
from glassllama.formats.pth import PthFile, open_pth

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "pth.md"


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, so that NaN payloads and subnormal numbers are among the values."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8).view(dtype).reshape(shape)


def saved(value: object, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def zipped(entries: dict[str, bytes], path: Path, **options: Any) -> Path:
    """The same entries in a zip of another writer: no padding, no 64-bit end record."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return path


def handmade(code: bytes, path: Path, **storages: bytes) -> Path:
    """A file whose pickle is `code`; the keys of its storages are prefixed with s."""
    data = {f"data/{key[1:]}": content for key, content in storages.items()}
    return zipped({"data.pkl": code, "version": b"3\n", **data}, path)


def assert_equal(file: PthFile, name: str, tensor: torch.Tensor) -> None:
    array, info = file.read(name), file.info(name)
    assert (array.shape, info.shape) == (tuple(tensor.shape),) * 2
    assert DTYPES[info.dtype] == tensor.dtype
    assert array.tobytes() == raw_bytes(tensor)
    assert array.flags.c_contiguous
    assert not array.flags.writeable


def assert_clean_error(path: Path, match: str) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        open_pth(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + 2 * len(str(path))


# ---- good files ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0, 4), (2, 3, 1, 5)])
def test_every_dtype_bit_for_bit(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    written = random_tensor(DTYPES[dtype], *shape)
    file = open_pth(saved({"x": written, "y": torch.ones(1)}, tmp_path / "a.pth"))
    assert file.names() == ["x", "y"]
    assert_equal(file, "x", written)
    info = file.info("x")
    assert Path(info.path).read_bytes()[info.offset :][: info.nbytes] == raw_bytes(written)
    file.verify()


def views() -> dict[str, torch.Tensor]:
    """Tensors that share storages in all ways that torch allows without overlap."""
    base = random_tensor(torch.bfloat16, 7, 6, 5)
    return {
        "base": base,
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 0, 2),
        "a row": base[3],
        "a column": base[:, 2, 1],
        "every second": base[1::2, :, ::3],
        "empty at the end": base[7:],
        "one axis of one": base[2:3].transpose(0, 1),
        "expanded along one": base[:1, :1].expand(1, 1, 5),
        "number": base[6, 5, 4],
        "parameter": torch.nn.Parameter(random_tensor(torch.float32, 3, 2).t()),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_of_shared_storages(protocol: int, tmp_path: Path) -> None:
    written = views()
    path = saved(written, tmp_path / "a.pth", pickle_protocol=protocol)
    file, oracle = open_pth(path), torch.load(path, weights_only=False)
    assert file.names() == list(written)
    for name in written:
        assert_equal(file, name, written[name])
        assert_equal(file, name, oracle[name])
        file.release_pages(name)
        assert_equal(file, name, written[name])


def test_rows_of_plain_and_transposed_tensors(tmp_path: Path) -> None:
    base = torch.arange(35).reshape(7, 5)
    file = open_pth(saved({"x": base, "t": base.t(), "n": base[3, 3]}, tmp_path / "a.pth"))
    for rows in (slice(1, 3), slice(None, None, 2), slice(-2, None), slice(4, 2)):
        np.testing.assert_array_equal(file.read("x", rows), base.numpy()[rows], strict=True)
        np.testing.assert_array_equal(file.read("t", rows), base.t().numpy()[rows], strict=True)
    assert not file.read("x", slice(1, 3)).flags.owndata  # a view of the file, not a copy
    with pytest.raises(FormatError, match="single number"):
        file.read("n", slice(0, 1))
    with pytest.raises(FormatError, match="no tensor named 'y'"):
        file.info("y")


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    file = open_pth(saved(module.state_dict(), tmp_path / "a.pth"))
    assert file.names() == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert_equal(file, name, tensor)


ONE, TWO = torch.ones(2), torch.zeros(3)


@pytest.mark.parametrize(
    ("value", "names", "metadata"),
    [
        ({"a": ONE, "b": TWO}, ["a", "b"], {}),
        (OrderedDict(b=ONE, a=TWO), ["b", "a"], {}),
        ({"model": {"a": ONE}}, ["a"], {}),
        ({"state_dict": OrderedDict(a=ONE), "epoch": 3}, ["a"], {"epoch": 3}),
        ({"model": {"a": ONE}, "optimizer": {0: {"avg": TWO, "step": 7}}, "args": {"dim": 0.5}},
         ["a"], {"optimizer.0.step": 7, "args.dim": 0.5}),
        ({"model": {"a": ONE}, "extra": TWO}, ["model.a", "extra"], {}),
        ({"model": {"a": ONE}, "state_dict": {"a": TWO}}, ["model.a", "state_dict.a"], {}),
        ({"layers": {0: {"wq": ONE}, 1: {"wq": TWO}}}, ["layers.0.wq", "layers.1.wq"], {}),
        ({"a": ONE, "name": "x", "none": None, "yes": True, "big": 2**70, "dtype": torch.bfloat16},
         ["a"], {"name": "x", "none": None, "yes": True, "big": 2**70, "dtype": "torch.bfloat16"}),
        ({"a": ONE, "size": torch.Size([1, 2]), "list": [1, TWO], "bytes": b"x" * 300}, ["a"], {}),
        ({}, [], {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [3, 5])
def test_nested_dicts_and_settings(
    value: object, names: list[str], metadata: dict[str, object], protocol: int, tmp_path: Path
) -> None:
    file = open_pth(saved(value, tmp_path / "a.pth", pickle_protocol=protocol))
    assert file.names() == names
    assert file.metadata == metadata


def test_the_file_in_the_documentation(tmp_path: Path) -> None:
    tiny = OrderedDict(w=torch.tensor([[1.0, 2, 3], [4, 5, 6]]).bfloat16())
    written = saved(tiny, tmp_path / "tiny.pth").read_bytes()
    lines = PAGE.read_text().split("```hex\n")[1].split("```")[0].splitlines()
    assert len(lines) > 30
    for line in lines:
        at, content = int(line[:3], 16), bytes.fromhex(line[5:52])
        assert written[at : at + len(content)] == content, line
    assert f"{len(written)} bytes" in PAGE.read_text()


def test_saved_to_a_stream(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"x": ONE}, stream)
    (tmp_path / "a.pth").write_bytes(stream.getvalue())
    assert_equal(open_pth(tmp_path / "a.pth"), "x", ONE)


def test_layout_of_torch_1_6(tmp_path: Path) -> None:
    """It had only data.pkl, data/N and version; torch reads it as the reference."""
    entries = entries_of(saved(views(), tmp_path / "new.pth"))
    old = {
        n: e for n, e in entries.items() if n in ("data.pkl", "version") or n.startswith("data/")
    }
    assert len(old) < len(entries)
    path = zipped(old, tmp_path / "old.pth")
    file, oracle = open_pth(path), torch.load(path, weights_only=True)
    for name in oracle:
        assert_equal(file, name, oracle[name])
    file.verify()


@pytest.mark.parametrize("dtype", DTYPES)
def test_big_endian(dtype: str, tmp_path: Path) -> None:
    """Bytes swapped by NumPy; torch, which swaps them back, is the reference."""
    written = random_tensor(DTYPES[dtype], 4, 3)
    tensors = {"x": written, "t": written.t(), "n": written[1, 1]}
    entries = entries_of(saved(tensors, tmp_path / "little.pth"))
    size = written.itemsize
    entries["data/0"] = np.frombuffer(entries["data/0"], f"u{size}").byteswap().tobytes()
    path = zipped(entries | {"byteorder": b"big"}, tmp_path / "big.pth")
    file, oracle = open_pth(path), torch.load(path, weights_only=True)
    for name, tensor in tensors.items():
        assert_equal(file, name, tensor)
        assert_equal(file, name, oracle[name])
    assert file.read("x", slice(1, 2)).tobytes() == raw_bytes(written[1:2])


def test_sizes_beyond_four_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large numbers are stored in extra fields; here for all entries beyond 20 bytes."""
    entries = entries_of(saved({"x": torch.arange(9), "y": ONE}, tmp_path / "a.pth"))
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
    path = zipped(entries, tmp_path / "b.pth")
    assert b"\xff\xff\xff\xff" in path.read_bytes()
    file = open_pth(path)
    assert_equal(file, "x", torch.arange(9))
    assert_equal(file, "y", ONE)
    file.verify()


def test_arrays_stay_valid_after_close_and_release_pages(tmp_path: Path) -> None:
    written = random_tensor(torch.bfloat16, 300, 70)
    file = open_pth(saved({"x": written}, tmp_path / "a.pth"))
    array = file.read("x")
    file.release_pages("x")
    file.close()
    assert array.tobytes() == raw_bytes(written)


# ---- checksums ----


@pytest.fixture
def two_storages(tmp_path: Path) -> tuple[Path, PthFile]:
    base = torch.arange(6.0).reshape(2, 3)
    path = saved({"left": base, "right": base.t(), "other": ONE}, tmp_path / "a.pth")
    return path, open_pth(path)


def flip(path: Path, byte: int, bit: int = 0) -> Path:
    with path.open("r+b") as file:
        file.seek(byte)
        flipped = file.read(1)[0] ^ 1 << bit
        file.seek(byte)
        file.write(bytes([flipped]))
    return path


def test_verify_names_the_damaged_tensors(two_storages: tuple[Path, PthFile]) -> None:
    path, file = two_storages
    reports: list[tuple[int, int]] = []
    file.verify(lambda done, total: reports.append((done, total)))
    assert reports[-1][0] == reports[-1][1] == sum(map(len, entries_of(path).values()))
    info = file.info("left")
    for byte in range(info.offset, info.offset + info.nbytes):
        damaged = open_pth(flip(path, byte, byte % 8))
        with pytest.raises(FormatError, match=r"data/0' \(tensors 'left', 'right'\)") as caught:
            damaged.verify()
        assert "other" not in str(caught.value)
        flip(path, byte, byte % 8)
    open_pth(path).verify()


def test_every_flipped_bit_in_a_tensor_is_detected(two_storages: tuple[Path, PthFile]) -> None:
    path, file = two_storages
    expected = {name: file.read(name).tobytes() for name in file.names()}
    noticed = 0
    for byte in range(path.stat().st_size):
        flip(path, byte, byte % 8)
        try:
            damaged = open_pth(path)
            damaged.verify()
            assert {name: damaged.read(name).tobytes() for name in damaged.names()} == expected
        except FormatError:
            noticed += 1
        flip(path, byte, byte % 8)
    assert noticed > sum(
        map(len, entries_of(path).values())
    )  # all contents and the structure of the zip


def test_saved_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = open_pth(saved({"x": ONE}, tmp_path / "a.pth"))
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(file, "x", ONE)
    assert not file.has_checksums
    with pytest.raises(FormatError, match="without checksums"):
        file.verify()


# ---- faults that torch itself can write (L3) ----


class Unknown:
    pass


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.remark = 1
    return tensor


WRITTEN_BY_TORCH: dict[str, tuple[Callable[[], object], str]] = {
    "global outside the whitelist": (lambda: {"a": Unknown}, "test_pth.Unknown': it is outside"),
    "object": (lambda: {"a": Unknown()}, "test_pth.Unknown': it is outside"),
    "whole module": (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear': it is out"),
    "numpy array": (lambda: {"a": np.ones(2)}, "numpy.* it is outside"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, r"sparse tensors .* \.to_dense"),
    "meta": (lambda: {"a": torch.ones(3, device="meta")}, "meta tensor has no data"),
    "stride 0": (lambda: {"a": torch.ones(3).expand(4, 3)}, "'a': expanded or overlapping"),
    "stride 0, huge": (lambda: {"a": torch.ones(1).expand(2**20, 2**20)}, "'a': expanded"),
    "overlap": (lambda: {"a": torch.ones(9).as_strided((4, 4), (1, 1))}, "'a': expanded or over"),
    "negated": (lambda: {"a": torch.ones(3)._neg_view()}, "_rebuild_tensor_v2: unexpected argum"),
    "complex": (lambda: {"a": torch.ones(3).cfloat()}, "torch.ComplexFloatStorage': it is outside"),
    "float8": (lambda: {"a": torch.ones(3).to(torch.float8_e4m3fn)}, "not supported .float8"),
    "uint16": (lambda: {"a": torch.ones(3).to(torch.uint16)}, "not supported .float8, uint16"),
    "attribute": (lambda: {"a": with_attribute(torch.ones(2))}, "tensors with attributes"),
    "attribute of a parameter": (
        lambda: {"a": with_attribute(torch.nn.Parameter(ONE))},
        "tensors with attributes",
    ),
    "a tensor alone": (lambda: ONE, "holds a StoredTensor, expected a state dict"),
    "a list": (lambda: [ONE], "holds a list, expected a state dict"),
    "tuple as key": (lambda: {(1, 2): ONE}, "dict key is a tuple"),
    "large number as key": (lambda: {2**40: ONE}, "dict key is a int"),
    "set": (lambda: {"a": {1, 2}}, "it is outside the whitelist"),
    "name twice": (lambda: {"a.b": ONE, "a": {"b": TWO}}, "'a.b' appears twice"),
    "number and text with the same name": (lambda: {1: ONE, "1": TWO}, "'1' appears twice"),
    "name of 2000 letters": (lambda: {"a" * 2000: ONE}, "letters long"),
}


@pytest.mark.parametrize("fault", WRITTEN_BY_TORCH)
def test_fault_written_by_torch(fault: str, tmp_path: Path) -> None:
    value, match = WRITTEN_BY_TORCH[fault]
    assert_clean_error(saved(value(), tmp_path / "a.pth"), match)


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_error_for_legacy_files_says_how_to_save_again(protocol: int, tmp_path: Path) -> None:
    path = saved(
        {"x": ONE},
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=False,
        pickle_protocol=protocol,
    )
    assert_clean_error(path, r"legacy form of torch < 1.6; .*torch\.save\(torch\.load\(")


def test_a_dict_that_contains_itself(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    assert_clean_error(saved(endless, tmp_path / "a.pth"), "32 dicts deep")


def test_a_dict_nested_thirty_times(tmp_path: Path) -> None:
    doubled: dict[str, Any] = {}
    for _ in range(30):
        doubled = {"a": doubled, "b": doubled}
    assert_clean_error(saved(doubled, tmp_path / "a.pth"), "250000 entries")


# ---- faults of the zip ----


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    path = saved({"x": ONE, "y": TWO}, tmp_path / "a.pth")
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        assert_clean_error(path, "is empty" if length == 0 else "truncated")


def test_compressed(tmp_path: Path) -> None:
    entries = entries_of(saved({"x": ONE}, tmp_path / "a.pth"))
    path = zipped(entries, tmp_path / "b.pth", compression=zipfile.ZIP_DEFLATED)
    assert_clean_error(path, "compressed or encrypted .method 8., expected stored")


def test_one_compressed_storage(tmp_path: Path) -> None:
    path = tmp_path / "b.pth"
    entries = entries_of(saved({"x": torch.zeros(999)}, tmp_path / "a.pth"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"a/{name}", content, zipfile.ZIP_LZMA if name == "data/0" else None)
    assert_clean_error(path, "'a/data/0': compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entry_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"x")
        archive.writestr("a/data.pkl", b"y")
    assert_clean_error(tmp_path / "a.pth", "'a/data.pkl' appears twice")


@pytest.mark.parametrize("names", [[], ["data.pkl"], ["a/b/data.pkl"], ["a/data.pkl", "b/c"]])
def test_other_zip_files(names: list[str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for name in names:
            archive.writestr(name, b"\x80\x02}.")
    assert_clean_error(tmp_path / "a.pth", "without FOLDER/data.pkl")


def test_missing_and_other_files(tmp_path: Path) -> None:
    assert_clean_error(tmp_path / "a.pth", "no such file")
    assert_clean_error(tmp_path, "is a folder")
    (tmp_path / "a.pth").write_bytes(b"GGUF" * 100)
    assert_clean_error(tmp_path / "a.pth", "no zip end record")


def test_zip_of_a_million_entries(tmp_path: Path) -> None:
    whole = saved({"x": ONE}, tmp_path / "a.pth").read_bytes()
    count = (10**6).to_bytes(8, "little")
    damaged = damaged_frame(whole, b"PK\6\6", 24, count * 2)
    (tmp_path / "a.pth").write_bytes(damaged_frame(damaged, b"PK\5\6", 8, b"\xff" * 4))
    assert_clean_error(tmp_path / "a.pth", "end records contradict")


def test_directory_of_the_zip_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved({"x": ONE}, tmp_path / "a.pth")
    monkeypatch.setattr("glassllama.formats.pth.LARGEST_DIRECTORY", 100)
    assert_clean_error(path, r"directory of \d+ bytes, expected at most 100")


@pytest.mark.parametrize("offset", [28, 32])  # of the name, of the comment
def test_a_length_beyond_the_directory_has_no_effect(offset: int, tmp_path: Path) -> None:
    path = saved({"x": ONE}, tmp_path / "a.pth")
    path.write_bytes(damaged_frame(path.read_bytes(), b"PK\1\2", offset, b"\xff"))
    file = open_pth(path)
    file.verify()
    assert_equal(file, "x", ONE)


def damaged_frame(whole: bytes, find: bytes, offset: int, content: bytes) -> bytes:
    """Overwrite bytes at an offset from the last position where `find` is found."""
    at = whole.rindex(find) + offset
    return whole[:at] + content + whole[at + len(content) :]


@pytest.mark.parametrize(
    ("find", "offset", "content", "match"),
    [
        (b"PK\5\6", 12, b"\1", "end records contradict"),
        (b"PK\5\6", 10, b"\1", "several disks"),
        (b"PK\5\6", 20, b"\1", "comment"),
        (b"PK\6\6", 0, b"XX", "directory cannot be read"),
        (b"PK\6\7", 8, b"\xff" * 8, "contradict"),
        (b"PK\6\6", 48, b"\xff" * 8, "contradict"),
        (b"PK\1\2", 0, b"XX", "directory cannot be read"),
        (b"PK\1\2", 8, b"\1", "compressed or encrypted"),
        (b"PK\1\2", 20, b"\1", "stored in"),
        (b"PK\1\2", 42, b"\xff", "local header"),
        (b"PK\1\2", 42, b"\xff" * 4, "no local header"),
        (b"PK\3\4", 0, b"XX", "no local header"),
        (b"PK\3\4", 30, b"X", "no local header of this name"),
        (b"PK\3\4", 28, b"\xff\x7f", "reaches to byte"),
    ],
)
def test_the_zip_structure_is_damaged(
    find: bytes, offset: int, content: bytes, match: str, tmp_path: Path
) -> None:
    path = saved({"x": ONE}, tmp_path / "a.pth")
    path.write_bytes(damaged_frame(path.read_bytes(), find, offset, content))
    assert_clean_error(path, match)


def test_damaged_pickle_and_byteorder(tmp_path: Path) -> None:
    whole = saved({"x": ONE}, tmp_path / "a.pth").read_bytes()
    for found in (b"ctorch\nFloatStorage", b"little"):
        flipped = damaged_frame(whole, found, 3, b"!")
        (tmp_path / "b.pth").write_bytes(flipped)
        assert_clean_error(tmp_path / "b.pth", "does not match its CRC-32")
    entries = entries_of(tmp_path / "a.pth") | {"byteorder": b"middle"}
    assert_clean_error(zipped(entries, tmp_path / "c.pth"), "byteorder b'middle'")


# ---- faults of the tensors: written by Python's pickler with torch's names ----


class Store:
    """A storage of float32 in entry data/0, with false values if requested."""

    def __init__(
        self, key: object = "0", count: object = 6, kind: object = torch.FloatStorage
    ) -> None:
        self.id = ("storage", kind, key, "cpu", count)


class Rebuilt:
    def __init__(self, *arguments: object, by: Any = torch._utils._rebuild_tensor_v2) -> None:
        self.arguments, self.by = arguments, by

    def __reduce__(self) -> tuple[Any, ...]:
        return self.by, self.arguments


def tensor(offset: object, shape: object, strides: object, store: Store | None = None) -> Rebuilt:
    return Rebuilt(store or Store(), offset, shape, strides, False, OrderedDict())


class StorePickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.id if isinstance(value, Store) else None


def pickled(value: object, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    StorePickler(stream, protocol).dump(value)
    return stream.getvalue()


def test_the_handmade_tensor_is_read(tmp_path: Path) -> None:
    """The unchanged file is valid, so the faults below are refused because of the fault."""
    content = np.arange(6, dtype=np.float32)
    code = pickled({"x": tensor(0, (2, 3), (3, 1)), "y": tensor(2, (2,), (3,))})
    path = handmade(code, tmp_path / "a.pth", s0=content.tobytes())
    file, oracle = open_pth(path), torch.load(path, weights_only=True)
    assert_equal(file, "x", oracle["x"])
    assert_equal(file, "y", oracle["y"])


def doubled_tuple() -> tuple[Any, ...]:
    """Small in the file, but 2^50 numbers when printed."""
    doubled: tuple[Any, ...] = (1,)
    for _ in range(50):
        doubled = (doubled, doubled)
    return doubled


H = OrderedDict
BAD_TENSORS: dict[str, tuple[object, str]] = {
    "outside": (tensor(1, (2, 3), (3, 1)), "reaches from element 1 over 6, its storage has 6"),
    "far outside": (tensor(2**62, (1,), (1,)), "reaches from"),
    "outside by strides": (tensor(0, (2, 3), (4, 1)), "reaches from element 0 over 7"),
    "before": (tensor(-1, (1,), (1,)), "reaches from element -1"),
    "empty but outside": (tensor(7, (0,), (1,)), "reaches from element 7"),
    "size negative": (tensor(0, (-1,), (1,)), "whole numbers"),
    "size a boolean": (tensor(0, (True,), (1,)), "unexpected arguments"),
    "size a fraction": (tensor(0, (2.0,), (1,)), "unexpected arguments"),
    "sizes overflow": (tensor(0, (2**62, 2**62), (1, 1)), "2.63 bytes"),
    "sizes 33": (tensor(0, (1,) * 33, (1,) * 33), "at most 32"),
    "stride negative": (tensor(5, (6,), (-1,)), "strides"),
    "stride huge": (tensor(0, (2,), (2**70,)), "reaches from"),
    "stride a fraction": (tensor(0, (2,), (1.0,)), "unexpected arguments"),
    "sizes that double": (tensor(0, doubled_tuple(), (1,)), "unexpected arguments"),
    "a stride too few": (tensor(0, (2, 3), (1,)), "strides"),
    "a stride too many": (tensor(0, (2,), (1, 1)), "strides"),
    "storage missing": (tensor(0, (1,), (1,), Store("7")), "storage '7' is missing"),
    "storage outside": (tensor(0, (1,), (1,), Store("../../x")), "'../../x' is missing"),
    "storage shorter": (tensor(0, (1,), (1,), Store(count=7)), "has 24 bytes, expected 7 x F32"),
    "storage longer": (tensor(0, (1,), (1,), Store(count=5)), "has 24 bytes, expected 5 x F32"),
    "storage negative": (tensor(0, (1,), (1,), Store(count=-6)), "not that of a storage"),
    "storage of 2^70": (tensor(0, (1,), (1,), Store(count=2**70)), "expected 118059162"),
    "storage of another type": (tensor(0, (1,), (1,), Store(kind="F32")), "not that of a storage"),
    "storage without key": (tensor(0, (1,), (1,), Store(key=0)), "not that of a storage"),
    "offset text": (tensor("0", (1,), (1,)), "_rebuild_tensor_v2: unexpected arguments"),
    "shape a number": (tensor(0, 3, (1,)), "_rebuild_tensor_v2: unexpected arguments"),
    "no arguments": (Rebuilt(), "_rebuild_tensor_v2: unexpected arguments"),
    "tensor of a tensor": (Rebuilt(tensor(0, (1,), (1,)), 0, (1,), (1,), False, H()), "unexpected"),
    "parameter of a storage": (
        Rebuilt(Store(), True, H(), by=torch._utils._rebuild_parameter),
        "_rebuild_parameter: unexpected arguments",
    ),
    "size of nothing": (Rebuilt(by=torch.Size), "torch.Size: unexpected arguments"),
    "dict of pairs": (Rebuilt([("a", 1)], by=OrderedDict), "OrderedDict: unexpected arguments"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_fault_of_a_tensor(fault: str, tmp_path: Path) -> None:
    value, match = BAD_TENSORS[fault]
    assert_clean_error(handmade(pickled({"x": value}), tmp_path / "a.pth", s0=bytes(24)), match)


# ---- faults of the pickle's program ----

PROGRAMS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "byte 0: pickle exhausted"),
    "protocol 0": (b"(dp0\n.", "opcode DICT is not one"),
    "protocol 6": (b"\x80\x06}.", "protocol 6"),
    "without end": (b"\x80\x02}", "byte 3: pickle exhausted"),
    "bytes after the end": (b"\x80\x02}.}", "bytes after its end"),
    "two results": (b"\x80\x02}}.", "values left over"),
    "no result": (b"\x80\x02.", "values left over"),
    "open mark": (b"\x80\x02(}.", "values left over"),
    "no mark": (b"\x80\x02}u.", "SETITEMS finds too little"),
    "empty stack for a tuple": (b"\x80\x02\x85.", "TUPLE1 finds too little"),
    "pops below a mark": (b"\x80\x02}(\x85.", "TUPLE1 finds too little"),
    "memo of an empty stack": (b"\x80\x02q\x00.", "BINPUT finds too little"),
    "memo never set": (b"\x80\x02h\x00.", "memo 0 was never set"),
    "key without value": (b"\x80\x02}(K\x01u.", "key without a value"),
    "items of a list": (b"\x80\x02](K\x01K\x01u.", "sets items of a list"),
    "appends to a dict": (b"\x80\x02}(K\x01e.", "appends to a dict"),
    "a list as key": (b"\x80\x02}]K\x01s.", "dict key is a list"),
    "calls a number": (b"\x80\x02K\x01)R.", "calls a int"),
    "calls a type of element": (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls a ElementType"),
    "arguments no tuple": (b"\x80\x02ccollections\nOrderedDict\n]R.", "calls a Call"),
    "state of a list": (b"\x80\x02]}b.", "sets the state of a list"),
    "name of numbers": (b"\x80\x04K\x01K\x01\x93.", "a name is not text"),
    "text of 4 GB": (b"\x80\x02X\xff\xff\xff\xffabc.", "only 4 remain"),
    "text of 2^64 bytes": (b"\x80\x04\x8d" + b"\xff" * 8 + b"abc.", "count > sys.maxsize"),
    "bytes of 4 GB": (b"\x80\x03B\xff\xff\xff\xffabc.", "only 4 remain"),
    "text is not UTF-8": (b"\x80\x02X\x01\x00\x00\x00\xff.", "codec can't decode"),
    "name without end": (b"\x80\x02ctorch\nFloatStorage", "no newline found"),
    "too many steps": (b"\x80\x02" + b")" * 3_000_100, "more than 3000000 steps"),
    "marks a million deep": (b"\x80\x02" + b"(" * 10**6, "more than 10000 open marks"),
    "tuples deep": (b"\x80\x02)" + b"\x85" * 10**5 + b".", "holds a tuple"),
    "lists deep": (b"\x80\x02]" + b"]" * 10**5 + b"a" * 10**5 + b".", "holds a list"),
    "pickle of 65 MB": (bytes(65 * 2**20), "has 68157440 bytes, expected at most"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PROGRAMS)
def test_fault_of_the_pickle_program(fault: str, tmp_path: Path) -> None:
    code, match = PROGRAMS[fault]
    assert_clean_error(handmade(code, tmp_path / "a.pth"), match)


# ---- nothing is executed ----

READERS = ["restricted_unpickler", "pth", "tensor_file"]
WAYS_TO_CODE = {"eval", "exec", "compile", "getattr", "setattr", "vars", "globals", "__import__"}


@pytest.mark.parametrize("reader", READERS)
def test_the_source_cannot_execute_code(reader: str) -> None:
    tree = ast.parse((Path(glassllama.formats.__path__[0]) / f"{reader}.py").read_text())
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    }
    assert not words & WAYS_TO_CODE
    assert not imported & {"pickle", "importlib", "sys", "os", "operator", "types", "torch"}


def touch(path: str) -> dict[str, object]:
    """Called by the gadgets: creates a file."""
    Path(path).touch()
    return {}


class Toucher:
    """All ways in which unpickling an object can execute code."""

    def __new__(cls, path: str = "", **_: object) -> Toucher:
        if path:
            touch(path)
        return super().__new__(cls)

    def __setstate__(self, state: dict[str, str]) -> None:
        touch(state["path"])


class ByReduce:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, (self.path,)


def with_state(path: str) -> Toucher:
    toucher = Toucher()
    vars(toucher)["path"] = path
    return toucher


class ByNewWithKeywords(ByReduce):
    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj_ex__, (Toucher, (self.path,), {"more": 1})


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


HERE = Toucher.__module__
EXTENSION = 240  # from the range for private use
GADGETS: dict[str, Callable[[str], bytes]] = {
    **{
        f"REDUCE, protocol {protocol}": lambda path, protocol=protocol: pickle.dumps(
            {"x": ByReduce(path)}, protocol
        )
        for protocol in range(6)
    },
    "INST": lambda path: f"(S'{path}'\ni{HERE}\ntouch\n.".encode(),
    "OBJ": lambda path: f"(c{HERE}\ntouch\n".encode() + text(path) + b"o.",
    "NEWOBJ": lambda path: f"c{HERE}\nToucher\n".encode() + text(path) + b"\x85\x81.",
    "NEWOBJ_EX": lambda path: pickle.dumps(ByNewWithKeywords(path), 4),
    "BUILD calls __setstate__": lambda path: pickle.dumps(with_state(path), 2),
    "STACK_GLOBAL": lambda path: (
        b"\x80\x04" + text(HERE) + text("touch") + b"\x93" + text(path) + b"\x85R."
    ),
    "STACK_GLOBAL through an attribute": lambda path: (
        b"\x80\x04" + text(HERE) + text("Toucher.__new__") + b"\x93"
        + f"c{HERE}\nToucher\n".encode() + text(path) + b"\x86R."
    ),
    "STACK_GLOBAL through a module of the whitelist": lambda path: (
        b"\x80\x04" + text("torch._utils") + text("torch.serialization.os.mknod") + b"\x93"
        + text(path) + b"\x85R."
    ),
    "EXT1": lambda path: b"\x80\x02\x82" + bytes([EXTENSION]) + text(path) + b"\x85R.",
    "EXT2": lambda path: b"\x80\x02\x83" + bytes([EXTENSION, 0]) + text(path) + b"\x85R.",
    "EXT4": lambda path: b"\x80\x02\x84" + bytes([EXTENSION, 0, 0, 0]) + text(path) + b"\x85R.",
    "after a tensor": lambda path: pickled({"x": tensor(0, (1,), (1,)), "y": ByReduce(path)}),
    "as an argument": lambda path: pickled({"x": Rebuilt(ByReduce(path), by=OrderedDict)}),
    "as a persistent id": lambda path: b"\x80\x02" + pickle.dumps(ByReduce(path), 2)[2:-1] + b"Q.",
}  # fmt: skip


class Unguarded(pickle.Unpickler):
    def persistent_load(self, _: object) -> object:
        plain = torch.UntypedStorage(24)
        return torch.storage.TypedStorage(wrap_storage=plain, dtype=torch.float32, _internal=True)


@pytest.fixture
def extension() -> Iterator[None]:
    copyreg.add_extension(HERE, "touch", EXTENSION)
    yield
    copyreg.remove_extension(HERE, "touch", EXTENSION)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("style", GADGETS)
def test_nothing_is_executed(style: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = GADGETS[style](str(canary))
    path = handmade(code, tmp_path / "a.pth", s0=bytes(24))
    assert_clean_error(path, "nothing was executed")
    assert not canary.exists()
    Unguarded(io.BytesIO(code)).load()  # the gadget works: Python's own reader executes it
    assert canary.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02Pstorage\n.",
        b"\x80\x02" + text("storage") + b"Q.",
        b"\x80\x02)Q.",
        b"\x80\x02]Q.",
        b"\x80\x02(" + text("module") + text("os") + text("system") + b"tQ.",
        b"\x80\x02(" + text("storage") + text("torch.FloatStorage") + text("0") * 2 + b"K\x01tQ.",
    ],
)
def test_persistent_ids_that_are_not_storages(code: bytes, tmp_path: Path) -> None:
    assert_clean_error(handmade(code, tmp_path / "a.pth", s0=bytes(4)), "nothing was executed")
