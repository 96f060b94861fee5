"""The zip files that torch.save writes: uncompressed entries, so that they can be mapped.

    local header, name, padding, data   once per entry; torch pads so that data begins at 64 · n
    central directory                   once per entry: name, size, checksum, offset
    (64-bit end record and its locator) for numbers too large for the end record; torch always
    end record                          offset of the directory

Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3. Anything that torch does not write is
an error: compression, encryption, comments, overlapping entries. Python's `zipfile` accepts these.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glassllama.base.errors import FormatError, quoted
from glassllama.formats.mmap_file import MappedFile

END = struct.Struct("<4s4H2IH")  # signature, disk ×2, entries ×2, directory size, offset, comment
LOCATOR = struct.Struct("<4sIQI")  # signature, disk, offset of the 64-bit end record, disks
END_64 = struct.Struct("<4sQ2H2I4Q")  # signature, size, versions, disk ×2, then as in END
CENTRAL = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
MOST_ENTRIES, LARGEST_DIRECTORY = 100_000, 32 * 2**20  # far above real checkpoints
STORED = 0
ENCRYPTED = 1  # bit of the flags
EXTRA_64 = 1  # the extra field that holds 64-bit sizes
FULL_16, FULL_32 = 2**16 - 1, 2**32 - 1  # the number is in the 64-bit record


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file inside the zip; `offset` and `nbytes` give its data in the outer file."""

    name: str
    header: int
    offset: int
    nbytes: int
    crc32: int


def read_directory(file: MappedFile) -> dict[str, Entry]:
    """Every entry by name. Raises FormatError for anything but a zip of uncompressed entries."""
    start, nbytes, count = _find_directory(file)
    if count > MOST_ENTRIES or nbytes > LARGEST_DIRECTORY:
        raise FormatError(
            f"{file.path}: zip directory of {count} entries, {nbytes} bytes; expected at most "
            f"{MOST_ENTRIES} and {LARGEST_DIRECTORY}"
        )
    raw = file.bytes_at(start, nbytes)
    entries: dict[str, Entry] = {}
    for entry in itertools.islice(_central_entries(raw, file), count + 1):
        if entry.name in entries:
            raise FormatError(f"{file.path}: zip entry {quoted(entry.name)} appears twice")
        entries[entry.name] = entry
    if len(entries) != count:
        raise FormatError(f"{file.path}: zip directory does not have the {count} entries it should")
    _check_no_overlap(entries, start, file.path)
    return entries


def _find_directory(file: MappedFile) -> tuple[int, int, int]:
    """-> (offset, bytes, entries) of the central directory, which must reach to the end records."""
    end = file.size - END.size
    raw = file.bytes_at(max(end, 0), END.size)
    if end < 0 or not raw.startswith(b"PK\5\6"):
        raise FormatError(
            f"{file.path}: no zip end record in the last {END.size} bytes: not a file of "
            "torch.save, or a truncated one; download or copy it again"
        )
    _, *disks, on_disk, count, nbytes, offset, comment = END.unpack(raw)
    if any(disks) or on_disk != count or comment:
        raise FormatError(f"{file.path}: zip end record: on several disks, or with a comment")
    locator = file.bytes_at(end - LOCATOR.size, LOCATOR.size) if end >= LOCATOR.size else b""
    directory_end = end
    if locator.startswith(b"PK\6\7"):
        directory_end = LOCATOR.unpack(locator)[2]
        raw = file.bytes_at(directory_end, END_64.size)
        if len(raw) < END_64.size or not raw.startswith(b"PK\6\6"):
            raise FormatError(f"{file.path}: zip 64-bit end record missing at {directory_end}")
        *_, count_64, nbytes_64, offset_64 = END_64.unpack(raw)
        small = ((count, count_64, FULL_16), (nbytes, nbytes_64, FULL_32))
        if any(a not in (b, full) for a, b, full in (*small, (offset, offset_64, FULL_32))):
            raise FormatError(f"{file.path}: the two zip end records contradict each other")
        count, nbytes, offset = count_64, nbytes_64, offset_64
    if offset + nbytes != directory_end:
        raise FormatError(
            f"{file.path}: zip directory ends at byte {offset + nbytes}, expected {directory_end}"
        )
    return offset, nbytes, count


def _central_entries(raw: bytes, file: MappedFile) -> Iterator[Entry]:
    position = 0
    while position < len(raw):
        fixed = raw[position : position + CENTRAL.size]
        if len(fixed) < CENTRAL.size or not fixed.startswith(b"PK\1\2"):
            raise FormatError(f"{file.path}: zip directory: no entry at its byte {position}")
        fields = CENTRAL.unpack(fixed)
        _, _, _, flags, method, _, _, crc32, packed, nbytes = fields[:10]
        name_bytes, extra_bytes, comment_bytes, disk, _, _, header = fields[10:]
        position += CENTRAL.size
        raw_name = raw[position : position + name_bytes]
        position += name_bytes
        extra = raw[position : position + extra_bytes]
        position += extra_bytes
        where = f"{file.path}: zip entry {quoted(raw_name.decode('utf-8', 'replace'))}"
        if position > len(raw) or comment_bytes or disk:
            raise FormatError(f"{where}: truncated, commented or on another disk")
        if method != STORED or flags & ENCRYPTED:
            raise FormatError(
                f"{where}: compressed or encrypted (method {method}), expected stored bytes; "
                "unpack it and save it with torch.save again"
            )
        nbytes, packed, header = _with_64_bits((nbytes, packed, header), extra, where)
        if nbytes != packed:
            raise FormatError(f"{where}: stored in {packed} bytes, expected {nbytes}")
        yield _with_local_header(raw_name, header, nbytes, crc32, file)


def _with_64_bits(fields: tuple[int, int, int], extra: bytes, where: str) -> tuple[int, ...]:
    """The fields; those with all bits set come from the extra field, which lists 64-bit values."""
    wide = iter(())
    while len(extra) >= 4:
        kind, nbytes = struct.unpack_from("<2H", extra)
        if kind == EXTRA_64:
            count = min(nbytes, len(extra) - 4) // 8
            wide = iter(struct.unpack_from(f"<{count}Q", extra, 4))
        extra = extra[4 + nbytes :]
    try:
        return tuple([next(wide) if field == FULL_32 else field for field in fields])
    except StopIteration as error:
        raise FormatError(f"{where}: its 64-bit sizes are missing") from error


def _with_local_header(
    raw_name: bytes, header: int, nbytes: int, crc32: int, file: MappedFile
) -> Entry:
    """The entry; the local header's lengths give the offset of the data."""
    raw = file.bytes_at(header, LOCAL.size)
    where = f"{file.path}: zip entry {quoted(raw_name.decode('utf-8', 'replace'))}"
    if len(raw) < LOCAL.size or not raw.startswith(b"PK\3\4"):
        raise FormatError(f"{where}: no local header at byte {header}")
    *_, name_bytes, extra_bytes = LOCAL.unpack(raw)
    if file.bytes_at(header + LOCAL.size, name_bytes) != raw_name:
        raise FormatError(f"{where}: its local header at byte {header} has another name")
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: its name is not UTF-8") from error
    offset = header + LOCAL.size + name_bytes + extra_bytes
    return Entry(name=name, header=header, offset=offset, nbytes=nbytes, crc32=crc32)


def _check_no_overlap(entries: dict[str, Entry], directory: int, path: Path) -> None:
    in_order = sorted(entries.values(), key=lambda entry: entry.header)
    ends = [(entry, after.header) for entry, after in itertools.pairwise(in_order)]
    for entry, limit in [*ends, *((last, directory) for last in in_order[-1:])]:
        if entry.offset + entry.nbytes > limit:
            raise FormatError(
                f"{path}: zip entry {quoted(entry.name)} reaches to byte "
                f"{entry.offset + entry.nbytes}, expected at most {limit}"
            )
