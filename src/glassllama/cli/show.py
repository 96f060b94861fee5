"""`glassllama show`: architecture, sizes, tokenizer and memory of a model."""

from __future__ import annotations

from typing import Any

from glassllama.base.machine import gigabytes
from glassllama.cli.console import print_json, print_table
from glassllama.cli.options import Json, ModelArgument, Offline, PreferPth, find


def show(
    model: ModelArgument,
    offline: Offline = False,
    pth: PreferPth = False,
    json: Json = False,
) -> None:
    """Show a model: architecture, sizes, number formats, tokenizer, memory."""
    from glassllama.weights.checkpoint import open_checkpoint
    from glassllama.weights.inspection import describe

    facts = describe(open_checkpoint(find(model, offline=offline, pth=pth)))
    if json:
        print_json({"model": model} | facts)
        return
    print(facts["path"] + "\n")
    print_table(["", ""], [*architecture_rows(facts), *tokenizer_rows(facts["tokenizer"])])
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
    if facts["architecture"] != "Llama":
        return rows + [(name.replace("_", " "), str(value)) for name, value in c.items()]
    scaling = f", scaled ({c['rope_scaling']['rule']})" if c["rope_scaling"] else ""
    return [
        *rows,
        ("layers", f"{c['n_layers']}"),
        ("width", f"{c['dim']:,}, feed-forward {c['ffn_dim']:,}"),
        ("heads", f"{c['n_heads']} query, {c['n_kv_heads']} key/value, width {c['head_dim']}"),
        ("RoPE", f"base {c['rope_theta']:,.0f}, {c['rope_layout']}{scaling}"),
        *([("QK-norm", "after RoPE")] if c["qk_norm"] else []),
        ("context", f"{c['max_seq_len']:,} tokens"),
        ("output", "tied to the embeddings" if c["tie_embeddings"] else "a separate matrix"),
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
