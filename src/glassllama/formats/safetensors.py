"""safetensors: a length, a JSON header, the bytes. One file, or shards with an index.json.

    0      8 bytes   N, the header's length, unsigned, little-endian
    8      N bytes   {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …}
    8 + N  the rest  the tensors one after another, no gaps; offsets count from here

Source: the format's description in the safetensors project (README, "Format"). The format has no
checksums; everything that the header says is checked before any tensor is read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glassllama.base.errors import FormatError, quoted
from glassllama.base.fields import relative_path
from glassllama.base.interfaces import TensorInfo
from glassllama.formats.blocks import ELEMENT_TYPES
from glassllama.formats.tensor_file import MappedFile, MappedTensors, checked_shape, format_of

LENGTH_BYTES = 8
LONGEST_HEADER = 100_000_000  # the format's own limit
ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}


def open_safetensors(path: Path) -> MappedTensors:
    """Open one .safetensors file, or every shard that a .safetensors.index.json names.

    The metadata is the `__metadata__` map, text to text; of shards, the union (later shards win).
    Raises FormatError, naming the file and the field, before any tensor is read.
    """
    path = Path(path)
    try:
        sharded = path.suffix.lower() == ".json" and format_of(path) != "safetensors"
    except OSError:  # opening it says why it cannot be read
        sharded = True
    if sharded:
        return _open_sharded(path)
    file = MappedFile(path)
    metadata, tensors = read_header(file)
    return MappedTensors([file], tensors, metadata)


def read_header(file: MappedFile) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """-> (`__metadata__`, tensors by name in the header's order), all of it checked."""
    if file.size < LENGTH_BYTES:
        raise FormatError(
            f"{file.path}: {file.size} bytes; a safetensors file begins with {LENGTH_BYTES} bytes "
            "of header length"
        )
    nbytes = int.from_bytes(file.bytes_at(0, LENGTH_BYTES), "little")
    most = min(file.size - LENGTH_BYTES, LONGEST_HEADER)
    if not 2 <= nbytes <= most:  # the shortest header is {}
        raise FormatError(
            f"{file.path}: header length {nbytes}, expected 2 … {most}; "
            "not a safetensors file, or a truncated one"
        )
    raw = file.bytes_at(LENGTH_BYTES, nbytes)
    if not raw.startswith(b"{"):
        raise FormatError(f"{file.path}: header must begin with '{{', got {quoted(raw[:1])}")
    header = parse_object(raw, f"{file.path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(
            f"{file.path}: __metadata__ must map text to text, got {quoted(metadata)}"
        )
    start = LENGTH_BYTES + nbytes
    tensors = {name: _tensor(name, entry, file.path, start) for name, entry in header.items()}
    _check_no_gaps(tensors.values(), start, file)
    return metadata, tensors


def _tensor(name: str, entry: object, path: Path, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != ENTRY_FIELDS:
        raise FormatError(f"{where}: expected {sorted(ENTRY_FIELDS)}, got {quoted(entry)}")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_TYPES:
        raise FormatError(
            f"{where}: dtype {quoted(dtype)} is not supported (have {' '.join(ELEMENT_TYPES)})"
        )
    itemsize = ELEMENT_TYPES[dtype].itemsize
    shape = checked_shape(entry["shape"], itemsize, where)
    if not isinstance(offsets, list) or [type(o) for o in offsets] != [int, int]:
        raise FormatError(f"{where}: data_offsets must be [begin, end], got {quoted(offsets)}")
    (begin, end), nbytes = offsets, math.prod(shape) * itemsize
    if begin < 0 or end - begin != nbytes:
        raise FormatError(
            f"{where}: data_offsets {quoted(offsets)}, but {dtype} {list(shape)} is {nbytes} bytes"
        )
    return TensorInfo(
        name=name, shape=shape, dtype=dtype, path=str(path), offset=data_start + begin,
        nbytes=nbytes,
    )  # fmt: skip


def _check_no_gaps(tensors: Iterable[TensorInfo], data_start: int, file: MappedFile) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    reached = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != reached:
            fault = "overlaps" if tensor.offset < reached else "leaves a hole after"
            raise FormatError(
                f"{file.path}: tensor {quoted(tensor.name)} {fault} the one before it: begins at "
                f"byte {tensor.offset}, expected {reached}"
            )
        reached += tensor.nbytes
    if reached != file.size:
        fault = "truncated" if reached > file.size else "has trailing bytes"
        raise FormatError(
            f"{file.path}: {fault}: {file.size} bytes, the header accounts for {reached}"
        )


def _open_sharded(index: Path) -> MappedTensors:
    """Open all shards; each tensor must be in the shard that the index names, and in no other."""
    weight_map = read_weight_map(index)
    files, tensors = list[MappedFile](), dict[str, TensorInfo]()
    metadata, found = dict[str, str](), dict[str, str]()  # tensor -> shard
    for shard in sorted(set(weight_map.values())):
        file = MappedFile(index.parent / shard)
        its_metadata, its_tensors = read_header(file)
        for name in its_tensors.keys() & found.keys():
            raise FormatError(f"{index}: tensor {quoted(name)} is in {found[name]} and in {shard}")
        files.append(file)
        found |= dict.fromkeys(its_tensors, shard)
        tensors |= its_tensors
        metadata |= its_metadata
    for name, shard in weight_map.items():
        if found.get(name) != shard:
            fault = f"is not in {shard}, nor elsewhere"
            if name in found:
                fault = f"is in {found[name]}, expected {shard}"
            raise FormatError(f"{index}: tensor {quoted(name)} {fault}")
    return MappedTensors(files, tensors, metadata)


def shard_names(index: Path) -> list[str]:
    """The files that an index names, all of them beside or below it. Raises FormatError."""
    return sorted(set(read_weight_map(index).values()))


def read_weight_map(index: Path) -> dict[str, str]:
    file = MappedFile(index)
    if file.size > LONGEST_HEADER:
        raise FormatError(f"{index}: {file.size} bytes, expected at most {LONGEST_HEADER}")
    weight_map = parse_object(file.bytes_at(0, file.size), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: expected a weight_map, tensor names to file names")
    paths: dict[str, str] = {}
    for tensor, shard in weight_map.items():
        if (path := relative_path(shard)) is None:
            raise FormatError(
                f"{index}: shard {quoted(shard)} of tensor {quoted(tensor)} must be the name of a "
                "file beside or below the index"
            )
        paths[tensor] = path
    return paths


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw` (UTF-8). Raises FormatError for duplicate keys, NaN, no object.

    Python's own parser takes the last of two equal keys; another reader might take the first.
    """
    try:
        parsed = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_each_key_once, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8 and digit limits
        raise FormatError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise FormatError(f"{where}: expected a JSON object, got {quoted(parsed)}")
    return parsed


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {quoted(twice)} appears twice")
    for key in unique:
        key.encode("utf-8")  # half a surrogate pair is a UnicodeEncodeError, a ValueError
    return unique


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
