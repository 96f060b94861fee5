"""The container format of a file, by its first bytes; if they are unknown, by its name.

    GGUF         "GGUF"
    safetensors  8 bytes of header length, of which the upper four are 0, and "{"
    zip          "PK", 3, 4: written by torch.save since torch 1.6
    pickle       128 and a protocol from 2 to 5: written by older versions

The name decides for damaged files, so that the reader of that format can say what is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from glassllama.formats.gguf_header import MAGIC as GGUF_MAGIC

Container = Literal["gguf", "safetensors", "zip", "pickle"]

ENDINGS: dict[str, Container] = {".gguf": "gguf", ".safetensors": "safetensors", ".pth": "zip"}
ZIP_MAGIC = b"PK\3\4"
PICKLE_MAGIC = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
SHORT_LENGTH = bytes(4)  # the upper half of a length below 4 GiB; headers have at most 100 MB
FIRST_BYTES = 9  # enough to tell the formats apart


def format_of(path: Path) -> Container | None:
    """The format of a file; None for folders and unknown formats.

    Raises OSError if a regular file cannot be read.
    """
    if path.is_dir():
        return None
    known = _by_content(path) if path.is_file() else None  # a pipe might never begin
    return known or ENDINGS.get(path.suffix.lower())


def formats_in(folder: Path) -> dict[Path, Container]:
    """The files of a folder that have a format, in the order of their names."""
    found: dict[Path, Container] = {}
    for path in sorted(folder.glob("*")):
        try:
            format = format_of(path)
        except OSError:  # a folder may hold files of others
            format = ENDINGS.get(path.suffix.lower())
        if format is not None:
            found[path] = format
    return found


def _by_content(path: Path) -> Container | None:
    with path.open("rb") as file:
        start = file.read(FIRST_BYTES)
    if start.startswith(GGUF_MAGIC):
        return "gguf"
    if start[4:] == SHORT_LENGTH + b"{":
        return "safetensors"
    if start.startswith(ZIP_MAGIC):
        return "zip"
    return "pickle" if start.startswith(PICKLE_MAGIC) else None
