"""`glassllama download`, `list`, `show` and `validate`: the files of models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from glassllama.base.errors import GlassError
from glassllama.base.machine import cache_home, gigabytes
from glassllama.cli.console import note, print_json, print_table, progress_bars, write
from glassllama.cli.options import JSON, MODEL, OFFLINE, PTH, find


def download(name: str = MODEL, offline: bool = OFFLINE, pth: bool = PTH) -> None:
    """Download a model once, so that it can be used without a network; prints its path.

    Datasets can be downloaded, too: tinyshakespeare, and shakespeare (all plays).
    Files in the cache are not downloaded again. An interrupted download is resumed if the source
    allows it.
    """
    from glassllama.hub import DATASETS, HUB_MODELS, PACKAGE_MODELS, fetch_dataset

    if name in DATASETS:
        with progress_bars() as bar:
            progress = bar(f"downloading {name}", "bytes")
            path = fetch_dataset(name, offline=offline, progress=progress)
    else:
        path = find(name, offline, pth)
    known = DATASETS.get(name) or PACKAGE_MODELS.get(name) or HUB_MODELS.get(name)
    if known is not None:
        note(f"{name}: license {known.license}")
    print(path)


# --- list -----------------------------------------------------------------------------------------


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


def list_models(json: bool = JSON) -> None:
    """List the models and datasets that have a short name, and all models on this machine."""
    from glassllama.hub import PACKAGE_MODELS

    entries = [*model_entries(), *dataset_entries()]
    if json:
        print_json([asdict(entry) for entry in entries])
        return
    for kind, title in (("model", "name"), ("text", "dataset")):
        rows = [
            (e.name, "yes" * e.here, gigabytes(e.bytes), (e.licence or "") + ", gated" * e.gated)
            for e in entries
            if e.kind == kind
        ]
        print_table([title, "here", "size>", "license"], rows)
        write("\n" * (kind == "model"))
    note(
        f"\nhere: on this machine, in {cache_home()} or the Hugging Face cache\n"
        "gated: accept the license on the model's Hugging Face page before the download\n"
        "besides these, any Hub id org/name[@revision][:FILE.gguf] and any path"
    )
    for file in PACKAGE_MODELS.values():
        if file.terms:
            note(f"{file.name}: {file.terms}")
    if files := list((cache_home() / "packed").glob("*.packed")):
        size = gigabytes(sum(file.stat().st_size for file in files))
        note(
            f"the engine keeps {size} of packed weights of large models in {files[0].parent}; they "
            "are made again where they are missing"
        )


def model_entries() -> list[Entry]:
    """The short names in order, then other models of the caches."""
    from glassllama.hub import HUB_MODELS, PACKAGE_MODELS, cached_models

    cached = {model.name: model for model in cached_models()}
    entries = [
        Entry(
            name=name, here=name in cached, bytes=file.bytes, licence=file.license,
            source=file.source,
        )
        for name, file in PACKAGE_MODELS.items()
    ]  # fmt: skip
    entries += [
        Entry(
            name=name, here=name in cached, bytes=(cached.get(name) or model).bytes,
            parameters=model.parameters, licence=model.license, gated=model.gated,
            source=model.repo,
        )
        for name, model in HUB_MODELS.items()
    ]  # fmt: skip
    others = [cached[name] for name in cached if name not in {entry.name for entry in entries}]
    return entries + [
        Entry(name=other.name, here=True, bytes=other.bytes, licence=None, source=str(other.path))
        for other in others
    ]


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


# --- show -----------------------------------------------------------------------------------------


def show(model: str = MODEL, offline: bool = OFFLINE, pth: bool = PTH, json: bool = JSON) -> None:
    """Show a model: architecture, sizes, number formats, tokenizer, memory."""
    from glassllama.weights.checkpoint import open_checkpoint
    from glassllama.weights.inspection import describe

    facts = describe(open_checkpoint(find(model, offline, pth)))
    if json:
        print_json({"model": model} | facts)
        return
    print(facts["path"] + "\n")
    sampling = facts["sampling"].get("error") or facts["sampling"]["text"] or "none recommended"
    rows = [*architecture_rows(facts), *tokenizer_rows(facts["tokenizer"]), ("sampling", sampling)]
    print_table(["", ""], rows)
    print()
    print_table(
        ["stored as", "tensors>", "numbers>", "size>", "bits each>"],
        [
            (row["type"], row["tensors"], f"{row['numbers']:,}", gigabytes(row["bytes"]),
             f"{8 * row['bytes'] / row['numbers']:.2f}")
            for row in facts["stored_as"]
        ],
    )  # fmt: skip
    print()
    if facts["memory"]:
        print_memory(facts["memory"], facts["memory_free"])
    for line in facts["notes"]:
        print(f"note: {line}")


def architecture_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    c = facts["config"]
    rows = [
        ("architecture", facts["architecture"]),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", gigabytes(facts["bytes"])),
    ]
    if not facts["decisions"]:
        return rows + [(name.replace("_", " "), str(value)) for name, value in c.items()]
    words = {name: word for name, word in facts["decisions"].items() if word != "none"}
    if not any(mark in words["positions"] for mark in (" in ", " of ")):
        del words["positions"]  # all layers have the RoPE of the configuration
    scaling = f", scaled ({c['rope_scaling']['rule']})" if c["rope_scaling"] else ""
    return [
        *rows,
        ("layers", f"{c['n_layers']}"),
        ("width", f"{c['dim']:,}, feed-forward {c['ffn_dim']:,}"),
        ("heads", f"{c['n_heads']} query, {c['n_kv_heads']} key/value, width {c['head_dim']}"),
        ("RoPE", f"base {c['rope_theta']:,.0f}, {c['rope_layout']}{scaling}"),
        *words.items(),
        ("context", f"{c['max_seq_len']:,} tokens"),
    ]


def tokenizer_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in facts:
        return [("tokenizer", f"none: {facts['error']}")]
    size, control = facts["vocab_size"], facts["control_tokens"]
    begin = "no begin token" if facts["bos"] is None else f"begins with {facts['bos']}"
    stops = " ".join(map(str, facts["stop_ids"])) or "no token"
    return [
        ("vocabulary", f"{size:,} tokens, {control} of them control tokens"),
        ("begin, end", f"{begin}, stops at {stops}"),
        ("chat format", facts["chat_format"] or "none: a base model"),
    ]


def print_memory(memory: list[dict[str, int]], free: int | None) -> None:
    rows = []
    for need in memory:
        total = need["weights"] + need["cache"]
        fits = "" if free is None else "fits" if total <= free else "does not fit"
        sizes = (gigabytes(n) for n in (need["weights"], need["cache"], total))
        rows.append((f"{need['context']:,}", *sizes, fits))
    last = "" if free is None else f"{gigabytes(free)} free"
    print_table(["context>", "weights>", "cache>", "total>", last], rows)


# --- validate -------------------------------------------------------------------------------------


def validate(
    model: str = MODEL, offline: bool = OFFLINE, pth: bool = PTH, json: bool = JSON
) -> None:
    """Check a model's files: structure, checksums, every number, tokenizer, chat template.

    Lists all problems, and exits with 1 if there are any.
    """
    from glassllama.hub import PACKAGE_MODELS
    from glassllama.weights.inspection import validate as validate_files

    path = find(model, offline, pth)
    hashes = [file.sha256 for file in PACKAGE_MODELS.values() if file.location == path]
    with progress_bars() as bars:
        found = validate_files(path, sha256="".join(hashes[:1]), bars=bars)
    problems = [finding.text for finding in found if not finding.ok]
    if json:
        fine = [finding.text for finding in found if finding.ok]
        print_json({"path": str(path), "ok": not problems, "checked": fine, "problems": problems})
    else:
        for finding in found:
            print(f"{'ok     ' if finding.ok else 'problem'}  {finding.text}")
    if problems:
        raise GlassError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}, see above")
