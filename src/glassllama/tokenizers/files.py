"""Reading files of tokenizers, with limits: nothing larger than any published file is accepted."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from glassllama.base.errors import TokenizerError, quoted

# Bytes. The largest published files have some 35 MB; parsed, JSON takes about eight times its size.
LARGEST_FILE = 2**28
LARGEST_VOCABULARY = 2**22  # sixteen times Gemma's; a file with a larger id is damaged
MAX_GAPS = 2**17  # ids without a token; a file that claims more of them is damaged, too


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. TokenizerError: not JSON, not an object, or too large."""
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
    """The bytes of a file. TokenizerError: not a regular file, or more than LARGEST_FILE bytes."""
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise TokenizerError(f"{path}: is not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(min(size, LARGEST_FILE) + 1)  # allocates no more than the file has
    if len(raw) > LARGEST_FILE:
        raise TokenizerError(
            f"{path}: has more than {LARGEST_FILE:,} bytes, which no file of a tokenizer has"
        )
    return raw


def size_of_vocabulary(ids: Collection[int]) -> int:
    """The largest id + 1. TokenizerError: a negative id, or far more ids than tokens."""
    size, most = max(ids, default=-1) + 1, min(LARGEST_VOCABULARY, len(ids) + MAX_GAPS)
    if min(ids, default=0) < 0 or size > most:
        raise TokenizerError(
            f"vocabulary: ids run from {min(ids)} to {size - 1}; expected 0 to at most {most - 1} "
            f"for {len(ids)} tokens"
        )
    return size
