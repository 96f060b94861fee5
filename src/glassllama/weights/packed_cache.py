"""Cache of packed weights on disk: the next start maps them instead of packing again.

    4096 bytes of header │ the arena as it was packed (native/engine/layout.py)

An entry is valid only for the same model files. Its name is a digest of
    - the offset, stored type and packed type of every tensor,
    - size, inode and times of change of the files; the inode's time cannot be set back,
    - the beginning of the files and samples of their pages, for file systems without such times,
    - the source of the packing code, so that another layout is another digest.
A file that changed in the last seconds, or while it was packed, is not cached: its times may stay
the same when it changes again.

Entries are written under another name, into disk space that was reserved, and then renamed. One
process packs; others wait for it and then map the entry.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import struct
import time
from contextlib import suppress
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from glassllama.base.errors import GlassError
from glassllama.base.machine import cache_home, gigabytes
from glassllama.base.trust import is_trusted, make_folder, require_trusted
from glassllama.native.engine.repack import layout_digest
from glassllama.native.jit.code_cache import remove_write_permission
from glassllama.native.jit.memory import own_memory
from glassllama.weights.checkpoint import Checkpoint
from glassllama.weights.quantization import PackingPlan

MAGIC = b"glassllama packed"
HEADER = struct.Struct(f"<{len(MAGIC)}s32sQ")  # magic, digest, bytes of data; then their sha256
HEADER_BYTES = 4096  # a page, so that weights begin on one
SUM_BYTES = 32
WORTH_KEEPING = 1_000_000_000  # packed bytes; smaller models are packed in a fraction of a second
KEPT_BYTES = 60_000_000_000  # of all entries; the least recently used is deleted first
SPARE_BYTES = 2_000_000_000  # of the disk, left free
RECENT = 2_000_000_000  # nanoseconds: coarser than the clock of any file system (FAT's)
SAMPLES, SAMPLE_BYTES, FIRST_BYTES = 64, 4096, 1 << 16  # of every file
LOCK_TIMEOUT = 120.0  # seconds to wait while another process packs
NOT_CACHED = "packed weights are not cached on disk, but made at every start: {}"


class NotCachedError(Exception):
    """The reason why an entry cannot be read or written."""


class Buffer:
    """Private memory for packed weights; a context manager around the packing."""

    filled = False  # whether it holds the weights already

    def __init__(self, nbytes: int) -> None:
        self.memory = own_memory(nbytes)

    def keep(self) -> None:
        """Called when all weights are packed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        pass


def open_buffer(checkpoint: Checkpoint, packed: PackingPlan, notes: list[str]) -> Buffer:
    """The buffer to pack into: on disk for large models; a reason against it goes to `notes`."""
    if packed.nbytes < WORTH_KEEPING:
        return Buffer(packed.nbytes)
    try:
        return FileBuffer(checkpoint, packed, notes)
    except NotCachedError as reason:
        notes.append(NOT_CACHED.format(reason))
    except GlassError as reason:  # no home folder, or one that others can write to
        notes.append(NOT_CACHED.format(reason))
    except OSError as error:
        notes.append(NOT_CACHED.format(f"{folder()}: {error.strerror or error}"))
    return Buffer(packed.nbytes)


class FileBuffer(Buffer):
    """A mapped file: a cache entry, or one that is being written."""

    def __init__(self, checkpoint: Checkpoint, packed: PackingPlan, notes: list[str]) -> None:
        """Raises NotKept, UntrustedError, OSError."""
        if os.name != "posix":
            raise NotCachedError("this system does not rename a file in use")
        self._checkpoint, self._packed, self._notes = checkpoint, packed, notes
        self._digest = digest(checkpoint, packed)
        self._path = (
            folder() / f"{entry_prefix(checkpoint, packed)}{self._digest.hex()[:16]}.packed"
        )
        self._part = self._path.with_suffix(".part")
        self._lock = FileLock(folder() / ".lock")
        require_trusted(folder())
        if self._found():
            return
        make_folder(folder())
        try:
            self._lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout:
            raise NotCachedError("another process has been packing for minutes") from None
        try:
            if not self._found():
                self._begin()
        except BaseException:
            self._end()
            raise

    def _found(self) -> bool:
        """Map the entry if it exists. Returns whether it does."""
        memory = mapped(self._path, self._digest, self._packed.nbytes)
        if memory is not None:
            self.memory, self.filled = memory, True
            with suppress(OSError):  # a read-only cache is a cache
                os.utime(self._path)
        return memory is not None

    def _begin(self) -> None:
        if recently_changed(self._checkpoint):
            raise NotCachedError("the file changed a moment ago, and may be changing")
        size = HEADER_BYTES + self._packed.nbytes
        make_room(size)
        with self._part.open("w+b") as file:
            remove_write_permission(self._part)
            reserve(file.fileno(), size)
            self._map = mmap.mmap(file.fileno(), size)
        self.memory = np.frombuffer(self._map, np.uint8)[HEADER_BYTES:]

    def keep(self) -> None:
        """Write to disk, then rename. A reason against it goes to the notes."""
        try:
            if digest(self._checkpoint, self._packed) != self._digest:
                raise NotCachedError("the file changed while it was packed")
            self._map.flush()
            header = HEADER.pack(MAGIC, self._digest, self._packed.nbytes)
            header += hashlib.sha256(header).digest()
            self._map[: len(header)] = header
            self._map.flush()
            os.replace(self._part, self._path)
            forget_others(self._path, entry_prefix(self._checkpoint, self._packed))
        except NotCachedError as reason:
            self._notes.append(NOT_CACHED.format(reason))
        except OSError as error:
            self._notes.append(NOT_CACHED.format(f"{self._path}: {error.strerror or error}"))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._lock.is_locked:
            with suppress(OSError):
                self._part.unlink(missing_ok=True)
            self._lock.release()


def folder() -> Path:
    return cache_home() / "packed"


def entries() -> list[Path]:
    """All entries, the least recently used first."""
    found = []
    for path in folder().glob("*.packed"):
        with suppress(OSError):
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def entry_prefix(checkpoint: Checkpoint, packed: PackingPlan) -> str:
    """The beginning of the names of all entries of this model with the same weight types."""
    weight_types = json.dumps([kind.name for kind in packed.weight_types.values()])
    where = hashlib.sha256(f"{checkpoint.path.absolute()} {weight_types}".encode())
    return f"{checkpoint.path.stem[:64]}-{where.hexdigest()[:8]}-"


def digest(checkpoint: Checkpoint, packed: PackingPlan) -> bytes:
    """32 bytes that change if any weight, its offset or the layout may have changed."""
    total = hashlib.sha256(layout_digest())
    for name, kind in packed.weight_types.items():
        info = checkpoint.info(name)
        line = (name, kind.name, info.dtype, info.shape, Path(info.path).name, info.offset)
        total.update(json.dumps(line).encode())
    for path in sources(checkpoint):
        facts = path.stat()
        times = (facts.st_mtime_ns, facts.st_ctime_ns)
        total.update(json.dumps((facts.st_size, facts.st_ino, *times)).encode())
        with path.open("rb") as file:
            total.update(file.read(FIRST_BYTES))
            for n in range(SAMPLES):
                file.seek(n * facts.st_size // SAMPLES)
                total.update(file.read(SAMPLE_BYTES))
    return total.digest()


def sources(checkpoint: Checkpoint) -> list[Path]:
    return sorted({Path(checkpoint.info(name).path) for name in checkpoint.names})


def recently_changed(checkpoint: Checkpoint) -> bool:
    facts = [path.stat() for path in sources(checkpoint)]
    latest = max(max(fact.st_mtime_ns, fact.st_ctime_ns) for fact in facts)
    return latest > time.time_ns() - RECENT


def mapped(path: Path, wanted: bytes, nbytes: int) -> NDArray[np.uint8] | None:
    """The data of an entry, read-only; None if it is missing, incomplete or another user's."""
    expected = HEADER.pack(MAGIC, wanted, nbytes)
    expected += hashlib.sha256(expected).digest()
    try:
        with path.open("rb") as file:
            whole = file.seek(0, os.SEEK_END) == HEADER_BYTES + nbytes
            file.seek(0)
            ours = is_trusted(os.fstat(file.fileno()))
            if not (ours and whole) or file.read(HEADER.size + SUM_BYTES) != expected:
                return None
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        return None
    return np.frombuffer(data, np.uint8)[HEADER_BYTES:]


def make_room(size: int) -> None:
    """Delete unfinished files and, if necessary, old entries. The caller has the lock."""
    for part in folder().glob("*.part"):
        part.unlink(missing_ok=True)
    for path in entries():
        total = sum(entry.stat().st_size for entry in entries())
        if total + size <= KEPT_BYTES and free_on_disk() >= size + SPARE_BYTES:
            return
        path.unlink(missing_ok=True)
    if size > KEPT_BYTES or free_on_disk() < size + SPARE_BYTES:
        raise NotCachedError(
            f"they take {gigabytes(size)}, {gigabytes(free_on_disk())} of the disk of {folder()} "
            f"are free and {gigabytes(SPARE_BYTES)} are left to others"
        )


def free_on_disk() -> int:
    return shutil.disk_usage(folder()).free


def reserve(file: int, size: int) -> None:
    """Reserve disk space: writing to a mapped file on a full disk would crash the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        os.write(file, zeros[: size - start])


def forget_others(path: Path, beginning: str) -> None:
    """Delete older entries of the same model."""
    for other in folder().glob(f"{escape(beginning)}*.packed"):
        if other != path:
            other.unlink(missing_ok=True)
