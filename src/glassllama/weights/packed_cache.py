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
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from glob import escape
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from glassllama.base.errors import GlassError
from glassllama.base.machine import cache_home, gigabytes
from glassllama.base.trust import is_trusted, make_folder, require_trusted
from glassllama.native.engine.repack import layout_digest
from glassllama.native.jit.code_cache import remove_write_permission
from glassllama.native.jit.memory import own_memory
from glassllama.weights.backend import PackingPlan
from glassllama.weights.checkpoint import Checkpoint

MAGIC = b"glassllama packed"
HEADER = struct.Struct(f"<{len(MAGIC)}s32sQ")  # magic, digest, bytes of data; then their sha256
HEADER_BYTES = 4096  # a page, so that weights begin on one
WORTH_KEEPING = 1_000_000_000  # packed bytes; smaller models are packed in a fraction of a second
KEPT_BYTES = 60_000_000_000  # of all entries; the least recently used is deleted first
SPARE_BYTES = 2_000_000_000  # of the disk, left free
RECENT = 2_000_000_000  # nanoseconds: coarser than the clock of any file system (FAT's)
SAMPLES, SAMPLE_BYTES, FIRST_BYTES = 64, 4096, 1 << 16  # of every file
LOCK_TIMEOUT = 120.0  # seconds to wait while another process packs
NOT_CACHED = "packed weights are not cached on disk, but made at every start: {}"


class NotCachedError(GlassError):
    """The reason why an entry cannot be read or written."""


@contextmanager
def open_buffer(
    checkpoint: Checkpoint, packed: PackingPlan, notes: list[str]
) -> Iterator[tuple[NDArray[np.uint8], bool]]:
    """Memory for packed weights, and whether it holds them already; else pack into it.

    For large models it is a file on disk, which is kept if the packing ends without an error. A
    reason against it goes to `notes`.
    """
    entry = None
    if packed.nbytes >= WORTH_KEEPING:
        with noted(notes):
            entry = CacheEntry(checkpoint, packed)
    if entry is None:
        yield own_memory(packed.nbytes), False
        return
    with closing(entry):
        yield entry.memory, entry.filled
        with noted(notes):
            entry.keep()


@contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """The reason why there is no entry becomes a note: weights are packed at every start then."""
    try:
        yield
    except GlassError as reason:  # no home folder, or one that others can write to, too
        notes.append(NOT_CACHED.format(reason))
    except OSError as error:
        notes.append(NOT_CACHED.format(f"{folder()}: {error.strerror or error}"))


class CacheEntry:
    """A mapped file: a complete entry of the cache (`filled`), or one that is being written."""

    filled = False
    memory: NDArray[np.uint8]

    def __init__(self, checkpoint: Checkpoint, packed: PackingPlan) -> None:
        """Raises NotCachedError, UntrustedError, OSError."""
        if os.name != "posix":
            raise NotCachedError("this system does not rename a file in use")
        self._checkpoint, self._packed = checkpoint, packed
        self._digest, self._prefix = digest(checkpoint, packed), entry_prefix(checkpoint, packed)
        self._size = HEADER_BYTES + packed.nbytes
        header = HEADER.pack(MAGIC, self._digest, packed.nbytes)
        self._header = header + hashlib.sha256(header).digest()
        self._path = folder() / f"{self._prefix}{self._digest.hex()[:16]}.packed"
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
            self.close()
            raise

    def _found(self) -> bool:
        """Map the entry, unless it is missing, incomplete or another user's."""
        try:
            with self._path.open("rb") as file:
                status, header = os.fstat(file.fileno()), file.read(len(self._header))
                if status.st_size != self._size or not is_trusted(status):
                    return False
                if header != self._header:
                    return False
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:
            return False
        self.memory, self.filled = np.frombuffer(data, np.uint8)[HEADER_BYTES:], True
        with suppress(OSError):  # a read-only cache is a cache
            os.utime(self._path)
        return True

    def _begin(self) -> None:
        facts = [path.stat() for path in sources(self._checkpoint)]
        latest = max(max(fact.st_mtime_ns, fact.st_ctime_ns) for fact in facts)
        if latest > time.time_ns() - RECENT:
            raise NotCachedError("the file changed a moment ago, and may be changing")
        make_room(self._size)
        with self._part.open("w+b") as file:
            remove_write_permission(self._part)
            reserve(file.fileno(), self._size)
            self._map = mmap.mmap(file.fileno(), self._size)
        self.memory = np.frombuffer(self._map, np.uint8)[HEADER_BYTES:]

    def keep(self) -> None:
        """Write a new entry to disk, then rename it. Raises NotCachedError, OSError."""
        if self.filled:
            return
        if digest(self._checkpoint, self._packed) != self._digest:
            raise NotCachedError("the file changed while it was packed")
        self._map.flush()
        self._map[: len(self._header)] = self._header
        self._map.flush()
        os.replace(self._part, self._path)
        for other in folder().glob(f"{escape(self._prefix)}*.packed"):  # of the same model
            if other != self._path:
                other.unlink(missing_ok=True)

    def close(self) -> None:
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
