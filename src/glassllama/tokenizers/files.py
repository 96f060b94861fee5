"""Reading the files of a tokenizer: none is longer than what any published one needs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from glassllama.base.errors import TokenizerError, quoted

# Bytes. The largest published files have some 35 MB; parsed, JSON takes about eight times its size.
LARGEST_FILE = 2**28


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. TokenizerError: it does not, or is larger than any."""
    raw = read_bounded(path)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as fault:
        what = quoted(str(fault))
        raise TokenizerError(f"{path}: is no JSON ({what}); download it again") from fault
    if not isinstance(document, dict):
        raise TokenizerError(f"{path}: must hold a JSON object, got {type(document).__name__}")
    return document


def read_bounded(path: Path) -> bytes:
    """A tokenizer's file. TokenizerError: no regular file, or more than LARGEST_FILE bytes."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise TokenizerError(f"{path}: is not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(min(size, LARGEST_FILE) + 1)  # no memory for more than is there
    if len(raw) > LARGEST_FILE:
        raise TokenizerError(
            f"{path}: has more than {LARGEST_FILE:,} bytes, which no file of a tokenizer has"
        )
    return raw
