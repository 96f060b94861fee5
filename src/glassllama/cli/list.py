"""`glassllama list`: what can be used by a short name, and what is already on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from glassllama.cli.console import note, print_json, print_table, write
from glassllama.cli.options import Json


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One line of the list. `parameters` None where only the file would tell."""

    name: str
    here: bool
    bytes: int  # on this disk, or to be downloaded
    parameters: int | None
    licence: str | None
    gated: bool
    source: str  # where it comes from, or where it is
    kind: Literal["model", "text"] = "model"


def list_models(json: Json = False) -> None:
    """List the models and texts that have a short name, and models on this machine already."""
    from glassllama.base.machine import cache_home

    models = everything()
    if json:
        print_json([asdict(entry) for entry in (*models, *texts())])
        return
    print_table(["name", "here", "size>", "licence"], [_row(model) for model in models])
    write("\n")
    print_table(["text", "here", "size>", "licence"], [_row(text) for text in texts()])
    note(
        f"\nhere: on this machine, in {cache_home()} or the Hugging Face cache\n"
        "gated: accept the licence on the model's Hugging Face page before the download\n"
        "besides these, any Hub id org/name[@revision][:FILE.gguf] and any path"
    )
    if line := packed_line():
        note(line)


def texts() -> list[Listed]:
    """The texts to learn from that can be downloaded by name."""
    from glassllama.hub import TEXTS, has_text, place_of_text

    return [
        Listed(
            name=name, here=has_text(name), bytes=text.bytes, parameters=None,
            licence=text.licence, gated=False, kind="text",
            source=str(place_of_text(name)) if has_text(name) else text.source,
        )
        for name, text in TEXTS.items()
    ]  # fmt: skip


def packed_line() -> str:
    """What the engine keeps of large models, so that nobody has to wonder where the disk went."""
    from glassllama.base.machine import cache_home, gigabytes

    entries = list((cache_home() / "packed").glob("*.packed"))
    if not entries:
        return ""
    size = gigabytes(sum(entry.stat().st_size for entry in entries))
    return (
        f"the engine keeps {size} of packed weights of large models in {entries[0].parent}; they "
        "are made again where they are missing"
    )


def everything() -> list[Listed]:
    """The short names in order, then other models of the caches."""
    from glassllama.hub import HUB_MODELS, PACKAGE_MODELS, cached

    here = {model.name: model for model in cached()}
    named = [
        Listed(
            name=name, here=name in here, bytes=file.bytes, parameters=None,
            licence=file.licence, gated=False, source=f"pip: {file.package}",
        )
        for name, file in PACKAGE_MODELS.items()
    ] + [
        Listed(
            name=name, here=name in here,
            bytes=here[name].bytes if name in here else model.bytes,
            parameters=model.parameters, licence=model.licence, gated=model.gated,
            source=model.repo,
        )
        for name, model in HUB_MODELS.items()
    ]  # fmt: skip
    named_already = {model.name for model in named}
    return named + [
        Listed(
            name=model.name, here=True, bytes=model.bytes, parameters=None,
            licence=None, gated=False, source=str(model.path),
        )
        for name, model in here.items()
        if name not in named_already
    ]  # fmt: skip


def _row(model: Listed) -> list[str]:
    from glassllama.base.machine import gigabytes

    gated = ", gated" if model.gated else ""
    return [
        model.name,
        "yes" if model.here else "",
        gigabytes(model.bytes),
        f"{model.licence}{gated}" if model.licence else "",
    ]
