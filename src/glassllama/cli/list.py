"""`glassllama list`: models and datasets that have a short name, and models on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from glassllama.cli.console import note, print_json, print_table, write
from glassllama.cli.options import Json


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the list."""

    name: str
    here: bool
    bytes: int  # on this disk, or to be downloaded
    parameters: int | None = None  # None: only the file says it
    licence: str | None  # a key of the JSON output, therefore in its old spelling
    gated: bool = False
    source: str  # where it comes from, or where it is
    kind: Literal["model", "text"] = "model"

    def row(self) -> list[str]:
        from glassllama.base.machine import gigabytes

        license = f"{self.licence or ''}{', gated' if self.gated else ''}"
        return [self.name, "yes" if self.here else "", gigabytes(self.bytes), license]


def list_models(json: Json = False) -> None:
    """List the models and datasets that have a short name, and all models on this machine."""
    from glassllama.base.machine import cache_home

    models, datasets = model_entries(), dataset_entries()
    if json:
        print_json([asdict(entry) for entry in (*models, *datasets)])
        return
    print_table(["name", "here", "size>", "license"], [entry.row() for entry in models])
    write("\n")
    print_table(["dataset", "here", "size>", "license"], [entry.row() for entry in datasets])
    note(
        f"\nhere: on this machine, in {cache_home()} or the Hugging Face cache\n"
        "gated: accept the license on the model's Hugging Face page before the download\n"
        "besides these, any Hub id org/name[@revision][:FILE.gguf] and any path"
    )
    if line := packed_line():
        note(line)


def model_entries() -> list[Entry]:
    """The short names in order, then other models of the caches."""
    from glassllama.hub import HUB_MODELS, PACKAGE_MODELS, cached_models

    cached = {model.name: model for model in cached_models()}
    entries = {
        name: Entry(
            name=name, here=name in cached, bytes=file.bytes, licence=file.license,
            source=file.source,
        )
        for name, file in PACKAGE_MODELS.items()
    }  # fmt: skip
    for name, model in HUB_MODELS.items():
        entries[name] = Entry(
            name=name, here=name in cached, bytes=(cached.get(name) or model).bytes,
            parameters=model.parameters, licence=model.license, gated=model.gated,
            source=model.repo,
        )  # fmt: skip
    for name, found in cached.items():
        if name not in entries:
            entries[name] = Entry(
                name=name, here=True, bytes=found.bytes, licence=None, source=str(found.path)
            )
    return [*entries.values()]


def dataset_entries() -> list[Entry]:
    """The datasets that can be downloaded by name."""
    from glassllama.hub import DATASETS, has_dataset

    here = {name: has_dataset(name) for name in DATASETS}
    return [
        Entry(
            name=name, here=here[name], bytes=dataset.bytes, licence=dataset.license, kind="text",
            source=str(dataset.location) if here[name] else dataset.source,
        )
        for name, dataset in DATASETS.items()
    ]  # fmt: skip


def packed_line() -> str:
    """How much disk the engine's packed weights of large models use."""
    from glassllama.base.machine import cache_home, gigabytes

    files = list((cache_home() / "packed").glob("*.packed"))
    if not files:
        return ""
    size = gigabytes(sum(file.stat().st_size for file in files))
    return (
        f"the engine keeps {size} of packed weights of large models in {files[0].parent}; they "
        "are made again where they are missing"
    )
