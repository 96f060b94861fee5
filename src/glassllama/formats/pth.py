"""Meta's .pth: what torch.save writes, read without torch and without running anything.

A zip of uncompressed entries: NAME/data.pkl is a pickle of the state dict
(formats/restricted_unpickler.py), in which each tensor says: storage K, from element `offset`, this
shape, these strides. NAME/data/K holds the bytes of storage K. NAME/byteorder says how.

Source: the serialization notes of PyTorch's documentation, and files of torch 1.6 … 2.13; PKWARE
APPNOTE.TXT 6.3.10, section 4.3, for the zip.
"""

from __future__ import annotations

import io
import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from glassllama.base.errors import FormatError, quoted
from glassllama.base.interfaces import Progress, TensorInfo
from glassllama.formats.blocks import ELEMENT_TYPES
from glassllama.formats.restricted_unpickler import StoredTensor, read_pickle
from glassllama.formats.tensor_file import MappedFile, MappedTensors, checked_shape

LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # how files of torch < 1.6 begin
LARGEST_SMALL_ENTRY = 64 * 2**20  # a pickle takes 120 bytes a tensor: half a million of them
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
DEEPEST, LONGEST_NAME, MOST_NAMES = 32, 1024, 250_000  # of nested state dicts
MOST_LISTED = 5  # damaged entries in one message, and tensors of each
PIECE = 8 * 2**20  # bytes between two reports of progress

END = struct.Struct("<4s4H2IH")  # signature, disk ×2, entries ×2, directory size, offset, comment
# Of the 64-bit records: entries ×2, directory size, offset; signature, disk, offset, disks.
TAIL_64 = struct.Struct("<4Q4sIQI")
END_64_BYTES, LOCATOR_BYTES = 56, 20
LOCAL = struct.Struct("<4s5H3I2H")
LARGEST_DIRECTORY = 16 * 2**20  # bytes: 150,000 entries, far above real checkpoints
UTF_8, ENCRYPTED = 1 << 11, 1  # bits of the flags
FULL_16, FULL_32 = 2**16 - 1, 2**32 - 1  # the number is in the 64-bit record


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file inside the zip; `offset` and `nbytes` give its data in the outer file."""

    name: str
    offset: int
    nbytes: int
    crc32: int


View = tuple[TensorInfo, tuple[int, ...], int]  # strides, and bytes from the first to the last


class PthFile(MappedTensors):
    """A `TensorFile` over one file of torch.save. Made by `open_pth`.

    `metadata` has the numbers, text and None that the file holds beside its tensors, by dotted
    name. The elements of a tensor that was saved strided lie further apart than its `nbytes` say.
    """

    def __init__(
        self, file: MappedFile, entries: Mapping[str, Entry], views: Mapping[str, View],
        metadata: Mapping[str, Any], *, big_endian: bool,
    ) -> None:  # fmt: skip
        super().__init__([file], {name: view[0] for name, view in views.items()}, metadata)
        self._entries, self._views, self._big_endian = entries, views, big_endian
        # False if PyTorch wrote none (`set_crc32_options(False)`):
        self.has_checksums = _have_checksums(entries)

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """As MappedTensors; big-endian elements are copied in this machine's order."""
        plain = super().read(name, rows)
        if self._big_endian:  # any type's bytes swap like whole numbers
            plain = plain.view(f"u{plain.dtype.itemsize}").byteswap().view(plain.dtype)
            plain.setflags(write=False)
        return plain

    def _view(self, info: TensorInfo) -> NDArray[Any]:
        file, strides = self._files[info.path], self._views[info.name][1]
        return file.array(info.shape, ELEMENT_TYPES[info.dtype], info.offset, strides)

    def _span(self, info: TensorInfo) -> int:
        return self._views[info.name][2]

    def verify(self, progress: Progress | None = None) -> None:
        """Compare every entry with its CRC-32; FormatError names the damaged tensors.

        `progress` counts bytes. FormatError also where the file was saved without checksums.
        """
        if not self.has_checksums:
            raise FormatError(f"{self._path}: saved without checksums, cannot be verified")
        file, damaged = self._files[self._path], list[Entry]()
        total, done = sum(entry.nbytes for entry in self._entries.values()), 0
        for entry in self._entries.values():
            crc32 = 0
            for start in range(0, entry.nbytes, PIECE):
                piece = min(PIECE, entry.nbytes - start)
                crc32 = zlib.crc32(file.bytes_at(entry.offset + start, piece), crc32)
                file.release_pages(entry.offset + start, piece)
                done += piece
                if progress is not None:
                    progress(done, total)
            if crc32 != entry.crc32:
                damaged.append(entry)
        if damaged:
            named = "; ".join(map(self._described, damaged[:MOST_LISTED]))
            raise FormatError(
                f"{self._path}: {len(damaged)} of {len(self._entries)} zip entries do not "
                f"match their CRC-32: {named}; download or copy the file again"
            )

    def _described(self, entry: Entry) -> str:
        within = range(entry.offset, entry.offset + entry.nbytes)
        tensors = [n for n, info in self._tensors.items() if info.offset in within]
        return f"{quoted(entry.name)} (tensors {', '.join(map(quoted, tensors[:MOST_LISTED]))})"


def open_pth(path: Path) -> PthFile:
    """Open one file of torch.save (torch 1.6 or later) that holds a state dict of plain tensors.

    Nested dicts give dotted names. A dict under one of WRAPPERS, in a root without tensors of its
    own, is the state dict; numbers and text beside it go to `metadata`. Tensors in lists have no
    name and are left out. Raises FormatError; nothing in the file is ever executed.
    """
    file = MappedFile(Path(path))
    if LEGACY_MAGIC in file.bytes_at(0, 2 * len(LEGACY_MAGIC)):
        raise FormatError(
            f"{path}: the legacy form of torch < 1.6; load it with torch and save it again: "
            "torch.save(torch.load(old, weights_only=True), new)"
        )
    entries = read_entries(file)
    folders = {name.partition("/")[0] for name in entries}  # one, named after the saved file
    folder = min(folders, default="")
    if len(folders) != 1 or f"{folder}/data.pkl" not in entries:
        raise FormatError(f"{path}: a zip file, but without FOLDER/data.pkl: not from torch.save")
    order = b"little"  # files of torch < 2.1 do not say; usual machines are little-endian
    if (entry := entries.get(f"{folder}/byteorder")) is not None:
        order = _checked_bytes(file, entry, entries)
    if order not in (b"little", b"big"):
        raise FormatError(f"{path}: byteorder {quoted(order)}, expected little or big")
    code = _checked_bytes(file, entries[f"{folder}/data.pkl"], entries)
    root = read_pickle(code, f"{path}: data.pkl")
    if not isinstance(root, dict):
        raise FormatError(f"{path}: holds a {type(root).__name__}, expected a state dict")
    views, metadata = dict[str, Any](), dict[str, Any]()
    for name, value in _state_and_settings(root, file.path):
        found: dict[str, Any] = views if isinstance(value, StoredTensor) else metadata
        if name in found:
            raise FormatError(f"{path}: {quoted(name)} appears twice")
        if isinstance(value, StoredTensor):
            value = _view_of(name, value, entries.get(f"{folder}/data/{value.storage.key}"), path)
        if value is None or isinstance(value, str | int | float) or found is views:
            found[name] = value
    return PthFile(file, entries, views, metadata, big_endian=order == b"big")


# --- the zip --------------------------------------------------------------------------------


class BoundedFile(io.FileIO):
    """A file for `zipfile`, which reads the directory at once, whatever its claimed size."""

    def read(self, nbytes: int | None = -1, /) -> bytes:
        if (nbytes or 0) > LARGEST_DIRECTORY:
            raise ValueError(f"directory of {nbytes} bytes, expected at most {LARGEST_DIRECTORY}")
        return super().read(nbytes) or b""


def read_entries(file: MappedFile) -> dict[str, Entry]:
    """Every entry by name. torch writes them uncompressed, so that they can be mapped.

    Raises FormatError for anything that torch does not write and `zipfile` accepts: compression,
    encryption, comments, several disks, overlapping entries, end records that contradict.
    """
    end = max(file.size - END.size, 0)
    raw = file.bytes_at(end, END.size)
    if len(raw) < END.size or not raw.startswith(b"PK\5\6"):
        raise FormatError(
            f"{file.path}: no zip end record in the last {END.size} bytes: not a file of "
            "torch.save, or a truncated one; download or copy it again"
        )
    _, *disks, on_disk, count, nbytes, offset, comment = END.unpack(raw)
    end_64 = end - LOCATOR_BYTES - END_64_BYTES
    try:
        with BoundedFile(file.path) as stream, zipfile.ZipFile(stream) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except Exception as error:  # BadZipFile, ValueError, struct.error and others
        raise FormatError(
            f"{file.path}: zip directory cannot be read ({error}): not a file of torch.save, or a "
            "damaged one; download or copy it again"
        ) from error
    # The 64-bit end record ends with counts, size and offset; the locator says where it begins.
    with_64, tail = file.bytes_at(max(end - LOCATOR_BYTES, 0), 4) == b"PK\6\7", b""
    if with_64:
        numbers = (len(infos), len(infos), max(end_64 - directory, 0), directory)
        tail = TAIL_64.pack(*numbers, b"PK\6\7", 0, end_64, 1)
    if (
        any(disks) or comment or on_disk != count
        or count not in (len(infos), FULL_16)
        or nbytes not in ((end_64 if with_64 else end) - directory, FULL_32)
        or offset not in (directory, FULL_32)
        or (with_64 and file.bytes_at(end - TAIL_64.size, TAIL_64.size) != tail)
    ):  # fmt: skip
        raise FormatError(
            f"{file.path}: zip end records contradict each other or the directory, or the zip has "
            "several disks or a comment"
        )
    infos.sort(key=lambda info: info.header_offset)
    limits, entries = [*(info.header_offset for info in infos[1:]), directory], dict[str, Entry]()
    for info, limit in zip(infos, limits, strict=False):
        entry = _checked_entry(info, file)
        if entry.offset + entry.nbytes > limit:
            raise FormatError(
                f"{file.path}: zip entry {quoted(entry.name)} reaches to byte "
                f"{entry.offset + entry.nbytes}, expected at most {limit}"
            )
        if entry.name in entries:
            raise FormatError(f"{file.path}: zip entry {quoted(entry.name)} appears twice")
        entries[entry.name] = entry
    return entries


def _checked_entry(info: zipfile.ZipInfo, file: MappedFile) -> Entry:
    """The entry; its local header, which must have the same name, gives the offset of its data."""
    where, start = f"{file.path}: zip entry {quoted(info.filename)}", max(info.header_offset, 0)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
        raise FormatError(
            f"{where}: compressed or encrypted (method {info.compress_type}), expected stored "
            "bytes; unpack it and save it with torch.save again"
        )
    if info.file_size != info.compress_size or info.comment:
        raise FormatError(
            f"{where}: stored in {info.compress_size} bytes, expected {info.file_size}, without a "
            "comment"
        )
    raw = file.bytes_at(start, LOCAL.size).ljust(LOCAL.size)
    signature, *_, name_bytes, extra_bytes = LOCAL.unpack(raw)
    name = info.orig_filename.encode("utf-8" if info.flag_bits & UTF_8 else "cp437")
    if signature != b"PK\3\4" or file.bytes_at(start + LOCAL.size, name_bytes) != name:
        raise FormatError(f"{where}: no local header of this name at byte {info.header_offset}")
    offset = start + LOCAL.size + name_bytes + extra_bytes
    return Entry(name=info.filename, offset=offset, nbytes=info.file_size, crc32=info.CRC)


def _checked_bytes(file: MappedFile, entry: Entry, entries: Mapping[str, Entry]) -> bytes:
    """A small entry's bytes; a flipped bit in them could name another offset in the file."""
    if entry.nbytes > LARGEST_SMALL_ENTRY:
        raise FormatError(
            f"{file.path}: zip entry {quoted(entry.name)} has {entry.nbytes} bytes, expected at "
            f"most {LARGEST_SMALL_ENTRY}"
        )
    raw = file.bytes_at(entry.offset, entry.nbytes)
    if _have_checksums(entries) and zlib.crc32(raw) != entry.crc32:
        raise FormatError(
            f"{file.path}: zip entry {quoted(entry.name)} does not match its CRC-32: damaged; "
            "download or copy the file again"
        )
    return raw


def _have_checksums(entries: Mapping[str, Entry]) -> bool:
    return any(entry.crc32 for entry in entries.values())


# --- the state dict -------------------------------------------------------------------------


def _state_and_settings(root: dict[Any, object], path: Path) -> Iterator[tuple[str, object]]:
    """Name and value of everything in the state dict, then of what lies beside it."""
    visits = itertools.count()
    wrappers = [key for key in WRAPPERS if isinstance(root.get(key), dict)]
    if len(wrappers) != 1 or any(isinstance(value, StoredTensor) for value in root.values()):
        yield from _leaves(root, "", path, visits=visits)
        return
    yield from _leaves(root[wrappers[0]], "", path, visits=visits)
    others = {key: value for key, value in root.items() if key != wrappers[0]}
    for name, value in _leaves(others, "", path, visits=visits):
        if not isinstance(value, StoredTensor):  # an optimizer's: no weights of the model
            yield name, value


def _leaves(
    mapping: Any, prefix: str, path: Path, *, visits: Iterator[int], depth: int = 1
) -> Iterator[tuple[str, object]]:
    """Everything in nested dicts that is no dict, by dotted name, in order.

    Bounded, because a dict may hold itself, or the same dict twice, thirty levels deep.
    """
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if depth > DEEPEST or len(name) > LONGEST_NAME or next(visits) >= MOST_NAMES:
            raise FormatError(
                f"{path}: at {quoted(name)}: more than {DEEPEST} dicts deep, {LONGEST_NAME} "
                f"letters long or {MOST_NAMES} entries in all"
            )
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.", path, visits=visits, depth=depth + 1)
        else:
            yield name, value


def _view_of(name: str, tensor: StoredTensor, entry: Entry | None, path: Path) -> View:
    """Raises FormatError for a tensor that is not inside its storage."""
    where = f"{path}: tensor {quoted(name)}"
    dtype, count = tensor.storage.dtype, tensor.storage.count
    itemsize = ELEMENT_TYPES[dtype].itemsize
    if entry is None or entry.nbytes != count * itemsize:
        found = "is missing" if entry is None else f"has {entry.nbytes} bytes"
        raise FormatError(
            f"{where}: storage {quoted(tensor.storage.key)} {found}, expected {count} x {dtype}"
        )
    shape = checked_shape(tensor.shape, itemsize, where)
    strides = _checked_strides(tensor.strides, shape, where)
    reach = sum((size - 1) * by for size, by in zip(shape, strides, strict=True))
    span = 0 if 0 in shape else reach + 1
    if not 0 <= tensor.offset <= count - span:
        raise FormatError(
            f"{where}: reaches from element {tensor.offset} over {span}, its storage has {count}"
        )
    info = TensorInfo(
        name=name, shape=shape, dtype=dtype, path=str(path),
        offset=entry.offset + tensor.offset * itemsize, nbytes=math.prod(shape) * itemsize,
    )  # fmt: skip
    return info, tuple(by * itemsize for by in strides), span * itemsize


def _checked_strides(
    strides: tuple[int, ...], shape: tuple[int, ...], where: str
) -> tuple[int, ...]:
    """Steps in elements, 1 for axes that are never stepped along (torch leaves any number there).

    Taken from the shortest step to the longest, each must step over all that the others reach:
    then no element is read twice, and a tensor is never larger than its storage.
    """
    if len(strides) != len(shape) or min(strides, default=0) < 0:
        raise FormatError(f"{where}: strides {quoted(strides)} for shape {quoted(shape)}")
    steps = tuple(by if size > 1 else 1 for by, size in zip(strides, shape, strict=True))
    reached = 1
    for by, size in sorted(zip(steps, shape, strict=True)):
        if size > 1 and by < reached:
            raise FormatError(
                f"{where}: expanded or overlapping (shape {quoted(shape)}, strides "
                f"{quoted(steps)}); save tensor.clone(memory_format=torch.contiguous_format)"
            )
        reached += max(size - 1, 0) * by
    return steps
