"""Which files of a repository make the model: the weights once, its config, its tokenizer.

Works on lists of names and the index of the weights alone, so the same rules choose from a listing
of the Hub and judge what a cache already holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from glassllama.base.errors import DownloadError, named, quoted
from glassllama.base.fields import inside

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # each is one on its own
SMALL = (
    *(CONFIG, "generation_config.json", *TOKENIZER, "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/default.jinja",
)

SINGLE = "model.safetensors"
LARGEST_INDEX = 100_000_000  # bytes
PTH = re.compile(r"consolidated\.\d+\.pth", re.IGNORECASE)
GGUF_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
MANY = 8  # names listed in an error


def safetensors_files(names: Iterable[str], repo: str, index: bytes | None) -> list[str]:
    """Weights as safetensors at the top of the repository, with config and tokenizer files.

    Where there is an `index`, the weights are the files that it names, however they are called; but
    model.safetensors is the model where the index does not name it, as in weights/open.py. Raises
    DownloadError: an index that cannot be read, or names a file that is not there.
    """
    present = set(names)
    weights = [SINGLE] if SINGLE in present else []
    shards = set() if index is None else shards_of(index, repo)
    if shards and (not weights or SINGLE in shards):
        if missing := sorted(shards - present):
            raise DownloadError(
                f"{repo}: {INDEX} names {quoted(missing[0])}, which is not there "
                f"({len(missing)} of {len(shards)} files missing)"
            )
        weights = [INDEX, *sorted(shards)]
    return weights + [name for name in SMALL if name in present] if weights else []


def shards_of(index: bytes, repo: str) -> set[str]:
    """The files that an index names. Raises DownloadError: not an index, or they lead outside."""
    try:
        shards = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        shards = set()
    if not shards:
        raise DownloadError(f"{repo}: {INDEX}: expected a weight_map, tensor names to file names")
    places: set[str] = set()
    for name in shards:
        place = inside(name)
        if place is None:
            raise DownloadError(
                f"{repo}: {INDEX} names {quoted(name)}: no file inside the repository"
            )
        places.add(place)
    return places


def pth_files(names: Iterable[str]) -> list[str]:
    """Meta's own form, `consolidated.NN.pth` beside `params.json`, wherever the folder is."""
    present = set(names)
    for folder in sorted({PurePosixPath(n).parent for n in present if PTH.fullmatch(_base(n))}):
        inside = sorted(n for n in present if PurePosixPath(n).parent == folder)
        shards = [n for n in inside if PTH.fullmatch(_base(n))]
        extras = [n for n in inside if _base(n) in ("params.json", "tokenizer.model")]
        if any(_base(n) == "params.json" for n in extras):
            return shards + extras
    return []


def gguf_files(names: Iterable[str], wanted: str, repo: str) -> list[str]:
    """The one GGUF file that `wanted` names (a file name or a quantisation), all its parts."""
    ggufs = sorted(filter(is_gguf, names))
    found = [n for n in ggufs if wanted in (n, _base(n))] or [
        n for n in ggufs if re.search(rf"(^|[-._/]){re.escape(wanted)}(?=[-.])", n, re.IGNORECASE)
    ]
    models = {GGUF_PART.sub("", name) for name in found}
    if len(models) != 1:
        came = f"{len(models)} files fit" if models else "no file fits"
        there = f"expected one of {listed(found or ggufs)}" if ggufs else "it holds no GGUF files"
        raise DownloadError(f"{repo}:{wanted}: {came}; {there}")
    return [n for n in ggufs if GGUF_PART.sub("", n) in models]


def missing_from(chosen: list[str]) -> str | None:
    """The first file that is missing from a model, judged by names only; None: none is missing.

    A part of a split GGUF file (-00001-of-0000N), or config.json beside safetensors.
    """
    if is_gguf(chosen[0]):
        parts = [match for name in chosen if (match := GGUF_PART.search(name))]
        totals = {int(part[2]) for part in parts}
        missing = {*range(1, 1 + max(totals, default=0))} - {int(part[1]) for part in parts}
        return f"part {min(missing)} of {max(totals)}" if missing else None
    return None if PTH.fullmatch(_base(chosen[0])) or CONFIG in chosen else CONFIG


def choose(
    names: list[str], repo: str, gguf: str | None, prefer_pth: bool, index: bytes | None
) -> list[str]:
    """The files to fetch of a repository that lists `names`. Raises DownloadError if none do.

    `index` is the content of INDEX, where the repository has one and it matters.
    """
    if gguf is not None:
        return gguf_files(names, gguf, repo)
    pth = pth_files(names)
    chosen = pth if prefer_pth else safetensors_files(names, repo, index) or pth
    if not chosen:
        expected = "" if prefer_pth else f"{SINGLE}, {INDEX} or "
        ggufs = [name for name in names if is_gguf(name)]
        hint = f"; name one of its GGUF files, as in {repo}:{named(ggufs[0])}" if ggufs else ""
        raise DownloadError(
            f"{repo}: expected {expected}consolidated.*.pth with params.json, found "
            f"{listed(names) or 'no files'}{hint}"
        )
    return chosen


def listed(names: list[str]) -> str:
    more = f", and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(map(named, names[:MANY])) + more


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _base(name: str) -> str:
    return PurePosixPath(name).name
