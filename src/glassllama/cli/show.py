"""`glassllama show`: what a model is made of, and what it needs of this machine."""

from __future__ import annotations

from typing import Any

from glassllama.cli.console import print_json, print_table
from glassllama.cli.model_info import describe
from glassllama.cli.options import Json, ModelArgument, Offline, PreferPth, find

LLAMA = "Llama"


def show(
    model: ModelArgument,
    offline: Offline = False,
    pth: PreferPth = False,
    json: Json = False,
) -> None:
    """Show a model: architecture, sizes, number formats, tokenizer, and the memory it needs."""
    from glassllama.weights.open import open_checkpoint

    facts = describe(open_checkpoint(find(model, offline=offline, pth=pth)))
    if json:
        print_json({"model": model} | facts)
        return
    print(facts["path"] + "\n")
    print_table(["", ""], [*architecture(facts), *tokenizer_lines(facts["tokenizer"])])
    print()
    print_stored(facts)
    print()
    if facts["memory"]:
        print_memory(facts)
    for line in facts["notes"]:
        print(f"note: {line}")


def architecture(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from glassllama.base.machine import gigabytes

    c = facts["config"]
    lines = [
        ("architecture", facts["architecture"]),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", gigabytes(facts["bytes"])),
    ]
    if facts["architecture"] == LLAMA:
        return lines + llama_lines(c)
    return lines + [(name.replace("_", " "), str(value)) for name, value in c.items()]


def llama_lines(c: dict[str, Any]) -> list[tuple[str, str]]:
    scaling = f", scaled ({c['rope_scaling']['rule']})" if c["rope_scaling"] else ""
    norm = [("q and k", "normed after the rotation")] if c["qk_norm"] else []
    return [
        ("layers", f"{c['n_layers']}"),
        ("width", f"{c['dim']:,}, in the feed-forward {c['ffn_dim']:,}"),
        ("heads", f"{c['n_heads']} query, {c['n_kv_heads']} key/value, each {c['head_dim']} wide"),
        ("rotations", f"base {c['rope_theta']:,.0f}, {c['rope_layout']}{scaling}"),
        *norm,
        ("context", f"{c['max_seq_len']:,} tokens"),
        ("output", "tied to the embeddings" if c["tie_embeddings"] else "a matrix of its own"),
    ]


def tokenizer_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in facts:
        return [("tokenizer", f"none: {facts['error']}")]
    begin = "no begin token" if facts["bos"] is None else f"begins with {facts['bos']}"
    stops = " ".join(map(str, facts["stop_ids"])) or "nothing"
    return [
        (
            "vocabulary",
            f"{facts['vocab_size']:,} tokens, {facts['control_tokens']} of them control",
        ),
        ("begin, end", f"{begin}, stops at {stops}"),
        ("chat format", facts["chat_format"] or "none: this model continues text"),
    ]


def print_stored(facts: dict[str, Any]) -> None:
    from glassllama.base.machine import gigabytes

    print_table(
        ["stored as", "tensors>", "numbers>", "size>", "bits each>"],
        [
            (
                kind["type"],
                kind["tensors"],
                f"{kind['numbers']:,}",
                gigabytes(kind["bytes"]),
                f"{8 * kind['bytes'] / kind['numbers']:.2f}",
            )
            for kind in facts["stored_as"]
        ],
    )


def print_memory(facts: dict[str, Any]) -> None:
    from glassllama.base.machine import gigabytes

    free = facts["memory_free"]

    def fits(need: dict[str, int]) -> str:
        if free is None:
            return ""
        return "fits" if need["weights"] + need["cache"] <= free else "does not fit"

    print_table(
        [
            "context>",
            "weights>",
            "cache>",
            "together>",
            "" if free is None else f"{gigabytes(free)} free",
        ],
        [
            (
                f"{need['context']:,}",
                gigabytes(need["weights"]),
                gigabytes(need["cache"]),
                gigabytes(need["weights"] + need["cache"]),
                fits(need),
            )
            for need in facts["memory"]
        ],
    )
