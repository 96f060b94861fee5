"""Meta's .pth: what torch.save writes, read without torch and without running anything.

A zip of stored entries (formats/stored_zip.py): NAME/data.pkl is a pickle of the state dict
(formats/restricted_unpickler.py), in which each tensor says: storage K, from element `offset`, this
shape, these strides. NAME/data/K holds the bytes of storage K. NAME/byteorder says how.

Source: the serialization notes of PyTorch's documentation, and files of torch 1.6 … 2.13.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from glassllama.base.errors import FormatError, quoted
from glassllama.base.interfaces import Progress, TensorInfo
from glassllama.formats.mmap_file import ELEMENT_TYPES, MappedFile, as_plain_array, checked_shape
from glassllama.formats.restricted_unpickler import (
    HINTS,
    NAMES,
    PickleMachine,
    StoredTensor,
    storage,
)
from glassllama.formats.stored_zip import Entry, read_directory

LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # how files of torch < 1.6 begin
LARGEST_SMALL_ENTRY = 64 * 2**20  # a pickle takes 120 bytes a tensor: half a million of them
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
DEEPEST, LONGEST_NAME, MOST_NAMES = 32, 1024, 250_000  # of nested state dicts
MOST_LISTED = 5  # damaged entries in one message, and tensors of each
PIECE = 8 * 2**20  # bytes between two reports of progress


@dataclass(frozen=True)
class TensorView:
    """A tensor in the mapped file: `strides` and `span` (first to last byte) in bytes."""

    info: TensorInfo
    strides: tuple[int, ...]
    span: int


class PthFile:
    """A `TensorFile` over one file of torch.save. Made by `open_pth`."""

    def __init__(
        self,
        file: MappedFile,
        entries: Mapping[str, Entry],
        views: Mapping[str, TensorView],
        metadata: Mapping[str, Any],
        *,
        big_endian: bool,
    ) -> None:
        self._file, self._entries, self._views = file, entries, views
        self._metadata = metadata
        self._big_endian = big_endian

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Numbers, text and None that the file holds beside its tensors, by dotted name."""
        return self._metadata

    @property
    def has_checksums(self) -> bool:
        """False where torch was told to leave them out (`set_crc32_options(False)`)."""
        return _have_checksums(self._entries)

    def names(self) -> list[str]:
        return list(self._views)

    def info(self, name: str) -> TensorInfo:
        """Where it begins and its own bytes, which lie further apart if it was saved strided."""
        return self._view_of(name).info

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """The elements as stored, of `shape` (or its `rows` along the first axis), read-only.

        A view of the mapped file; a copy where it was saved transposed or big-endian.
        """
        view = self._view_of(name)
        dtype = ELEMENT_TYPES[view.info.dtype]
        array = self._file.array(view.info.shape, dtype, view.info.offset, view.strides)
        plain = as_plain_array(array, rows)
        return _swapped(plain) if self._big_endian else plain

    def release_pages(self, name: str) -> None:
        view = self._view_of(name)
        self._file.release_pages(view.info.offset, view.span)

    def close(self) -> None:
        self._file.close()

    def verify(self, progress: Progress | None = None) -> None:
        """Compare every entry with its CRC-32; FormatError names the damaged tensors.

        `progress` counts bytes. FormatError also where the file was saved without checksums.
        """
        if not self.has_checksums:
            raise FormatError(f"{self._file.path}: saved without checksums, cannot be verified")
        damaged = list[Entry]()
        total, done = sum(entry.nbytes for entry in self._entries.values()), 0
        for entry in self._entries.values():
            crc32 = 0
            for start in range(0, entry.nbytes, PIECE):
                piece = min(PIECE, entry.nbytes - start)
                crc32 = zlib.crc32(self._file.bytes_at(entry.offset + start, piece), crc32)
                self._file.release_pages(entry.offset + start, piece)
                done += piece
                if progress is not None:
                    progress(done, total)
            if crc32 != entry.crc32:
                damaged.append(entry)
        if damaged:
            named = "; ".join(map(self._described, damaged[:MOST_LISTED]))
            raise FormatError(
                f"{self._file.path}: {len(damaged)} of {len(self._entries)} zip entries do not "
                f"match their CRC-32: {named}; download or copy the file again"
            )

    def _view_of(self, name: str) -> TensorView:
        if name not in self._views:
            raise FormatError(f"{self._file.path}: no tensor named {quoted(name)}")
        return self._views[name]

    def _described(self, entry: Entry) -> str:
        within = range(entry.offset, entry.offset + entry.nbytes)
        tensors = [n for n, view in self._views.items() if view.info.offset in within]
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
    entries = read_directory(file)
    folder = _folder(entries, file.path)
    big_endian = _is_big_endian(file, entries, folder)
    root = _unpickled(file, entries, folder)
    views, metadata = dict[str, TensorView](), dict[str, Any]()
    for name, value in _state_and_settings(root, file.path):
        if name in (views if isinstance(value, StoredTensor) else metadata):
            raise FormatError(f"{path}: {quoted(name)} appears twice")
        if isinstance(value, StoredTensor):
            views[name] = _view_of(name, value, entries, folder=folder, path=file.path)
        elif value is None or isinstance(value, str | int | float):
            metadata[name] = value
    return PthFile(file, entries, views, metadata, big_endian=big_endian)


def _folder(entries: Mapping[str, Entry], path: Path) -> str:
    """The one folder that everything in the zip lies in: named after the file that was saved."""
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1 or f"{min(folders)}/data.pkl" not in entries:
        raise FormatError(f"{path}: a zip file, but without FOLDER/data.pkl: not from torch.save")
    return folders.pop()


def _is_big_endian(file: MappedFile, entries: Mapping[str, Entry], folder: str) -> bool:
    """Files of torch < 2.1 have no such entry: they were little-endian on every usual machine."""
    if (entry := entries.get(f"{folder}/byteorder")) is None:
        return False
    order = _checked_bytes(file, entry, entries)
    if order not in (b"little", b"big"):
        raise FormatError(f"{file.path}: byteorder {quoted(order)}, expected little or big")
    return order == b"big"


def _unpickled(file: MappedFile, entries: Mapping[str, Entry], folder: str) -> dict[Any, object]:
    code = _checked_bytes(file, entries[f"{folder}/data.pkl"], entries)
    machine = PickleMachine(
        code, f"{file.path}: data.pkl", names=NAMES, hints=HINTS, persistent=storage
    )
    root = machine.run()
    if not isinstance(root, dict):
        raise FormatError(f"{file.path}: holds a {type(root).__name__}, expected a state dict")
    return root


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


def _state_and_settings(root: dict[Any, object], path: Path) -> Iterator[tuple[str, object]]:
    """Name and value of everything in the state dict, then of what lies beside it."""
    visits = itertools.count()
    wrappers = [key for key in WRAPPERS if isinstance(root.get(key), dict)]
    if len(wrappers) != 1 or any(isinstance(value, StoredTensor) for value in root.values()):
        yield from _leaves(root, "", path, visits=visits)
        return
    yield from _leaves(root[wrappers[0]], "", path, visits=visits)
    beside = {key: value for key, value in root.items() if key != wrappers[0]}
    for name, value in _leaves(beside, "", path, visits=visits):
        if not isinstance(value, StoredTensor):  # an optimiser's: no weights of the model
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


def _view_of(
    name: str, tensor: StoredTensor, entries: Mapping[str, Entry], *, folder: str, path: Path
) -> TensorView:
    """Check a tensor against its storage: inside it, and no element used twice."""
    where = f"{path}: tensor {quoted(name)}"
    entry = entries.get(f"{folder}/data/{tensor.storage.key}")
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
        name=name,
        shape=shape,
        dtype=dtype,
        path=str(path),
        offset=entry.offset + tensor.offset * itemsize,
        nbytes=math.prod(shape) * itemsize,
    )
    return TensorView(info, tuple(by * itemsize for by in strides), span * itemsize)


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


def _swapped(big: NDArray[Any]) -> NDArray[Any]:
    """Big-endian elements in this machine's order; any type's bytes swap like whole numbers."""
    swapped = big.view(f"u{big.dtype.itemsize}").byteswap().view(big.dtype)
    swapped.setflags(write=False)
    return swapped
