"""Which files of a repository make the model: the weights once, its config, its tokenizer.

Works on lists of names alone, so the same rules choose from a listing of the Hub and judge what a
cache already holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from glassllama.base.errors import DownloadError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")  # each is one on its own
SMALL = (
    *(CONFIG, "generation_config.json", *TOKENIZER, "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
PTH = re.compile(r"consolidated\.\d+\.pth")
GGUF_PART = re.compile(r"-\d{5}-of-(\d{5})(?=\.gguf$)")
MANY = 8  # names listed in an error


def safetensors_files(names: Iterable[str]) -> list[str]:
    """Weights as safetensors at the top of the repository, with config and tokenizer files."""
    present = set(names)
    weights = sorted(name for name in present if WEIGHTS.fullmatch(name))
    if INDEX in present:  # then a single model.safetensors beside it would be the weights twice
        weights = [INDEX, *(name for name in weights if "-of-" in name)]
    return weights + [name for name in SMALL if name in present] if weights else []


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
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    found = [n for n in ggufs if wanted in (n, _base(n))] or [
        n for n in ggufs if re.search(rf"(^|[-._/]){re.escape(wanted)}(?=[-.])", n, re.IGNORECASE)
    ]
    models = {GGUF_PART.sub("", name) for name in found}
    if len(models) != 1:
        came = f"{len(models)} files fit" if models else "no file fits"
        there = f"expected one of {listed(found or ggufs)}" if ggufs else "it holds no GGUF files"
        raise DownloadError(f"{repo}:{wanted}: {came}; {there}")
    return [n for n in ggufs if GGUF_PART.sub("", n) in models]


def missing_gguf_parts(found: list[str]) -> bool:
    """Whether a split file (-00001-of-0000N) is not all there."""
    part = GGUF_PART.search(found[0])
    return part is not None and len(found) != int(part[1])


def choose(names: list[str], repo: str, gguf: str | None, prefer_pth: bool) -> list[str]:
    """The files to fetch of a repository that lists `names`. Raises DownloadError if none do."""
    if gguf is not None:
        return gguf_files(names, gguf, repo)
    safetensors, pth = safetensors_files(names), pth_files(names)
    chosen = pth if prefer_pth else safetensors or pth
    if not chosen:
        expected = "" if prefer_pth else "model.safetensors or "
        ggufs = [name for name in names if name.endswith(".gguf")]
        hint = f"; name one of its GGUF files, as in {repo}:{ggufs[0]}" if ggufs else ""
        raise DownloadError(
            f"{repo}: expected {expected}consolidated.*.pth with params.json, found "
            f"{listed(names) or 'no files'}{hint}"
        )
    return chosen


def listed(names: list[str]) -> str:
    more = f", and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more


def _base(name: str) -> str:
    return PurePosixPath(name).name
