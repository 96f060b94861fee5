"""What `glassllama show` says of a checkpoint, and what `glassllama validate` checks.

`describe` reads only metadata: sizes, number formats, tokenizer, memory needed. `decisions` says in
words what a model computes. `validate` reads everything: structure, checksums, every number,
tokenizer, chat template.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glassllama.base.errors import GlassError, TokenizerError
from glassllama.base.interfaces import CACHE_NUMBER, CACHE_SCALE, Progress, Tokenizer
from glassllama.base.layer_plan import NORM_NAMES, AttentionPlan, ModelPlan, QKNorm
from glassllama.base.machine import available_memory
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.tokenizers.chat import choose_chat_format
from glassllama.weights.backend import packing_plan
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint

FIRST_CONTEXT, CONTEXT_FACTOR = 2048, 4  # rows of the memory table: 2,048, 8,192, … the longest
CHAT_FORMATS = {
    "TemplateChat": "the model's own template", "ChatML": "ChatML", "Llama3Chat": "Llama 3",
}  # fmt: skip


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """All facts, as `show --json` prints them. Sizes in bytes."""
    infos = [checkpoint.info(name) for name in checkpoint.names]
    return {
        "path": str(checkpoint.path),
        "family": checkpoint.file_format,
        "parameters": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "architecture": checkpoint.architecture.title,
        "config": config_facts(checkpoint),
        "decisions": decisions(checkpoint.layer_plan) if checkpoint.architecture.layer_plan else {},
        "stored_as": stored_formats(checkpoint),
        "tokenizer": tokenizer_facts(checkpoint),
        "sampling": sampling_facts(checkpoint),
        "memory": memory_needed(checkpoint),
        "memory_free": available_memory(),
        "notes": checkpoint.notes,
    }


def config_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of the configuration; `rope_scaling` with the name of its rule."""
    facts = asdict(checkpoint.config)
    if facts.get("rope_scaling") is not None:
        rule = type(checkpoint.config.rope_scaling).__name__
        facts["rope_scaling"] = {"rule": rule, **facts["rope_scaling"]}
    return facts


# Norms of a block, the kind of QK-norm and the activation in words.
NORMS = {
    ("attention_norm", "ffn_norm"): "before attention and feed-forward",
    ("post_attention_norm", "post_ffn_norm"): "after attention and feed-forward",
    tuple(NORM_NAMES.values()): "before and after attention and feed-forward",
}
QK_NORMS: dict[QKNorm, str] = {
    "none": "none", "per_head": "of every head", "full_width": "of all heads together",
    "unweighted": "of every head, without weights",
}  # fmt: skip
GATED = {"silu": "SwiGLU", "gelu_tanh": "GeGLU"}


def decisions(plan: ModelPlan) -> dict[str, str]:
    """How a model differs from others, besides sizes: a design decision -> words."""
    block, ffn = plan.blocks[0], plan.blocks[0].feed_forward
    norms, layers = tuple(block.norm_names()), [block.attention for block in plan.blocks]
    a, after = block.attention, " after RoPE" if block.attention.qk_norm_after_rope else ""
    multipliers = {
        "embeddings": plan.embedding_multiplier, "residuals": block.residual_multiplier,
        "logits": plan.logit_multiplier,
    }  # fmt: skip
    caps = {"scores": a.softcap, "logits": plan.logit_softcap}
    return {
        "norms": NORMS.get(norms, ", ".join(norms) or "none"),
        "norm of q and k": QK_NORMS[a.qk_norm] + (after if a.qk_norm != "none" else ""),
        "biases": ", ".join(letter for letter in "qkvo" if letter in a.biases) or "none",
        "positions": by_layers([rope_words(one) for one in layers]),
        "window": by_layers([f"{one.window:,} tokens" if one.window else "none" for one in layers]),
        "scale of scores": scale_words(a),
        "soft caps": ", ".join(f"{n} {cap:g}" for n, cap in caps.items() if cap) or "none",
        "feed-forward": GATED[ffn.activation] + (" with biases" if ffn.bias else ""),
        "multipliers": ", ".join(f"{n} × {m:.4g}" for n, m in multipliers.items() if m != 1)
        or "none",
        "output": "tied to the embeddings" if plan.tie_embeddings else "a separate matrix",
    }


def scale_words(plan: AttentionPlan) -> str:
    words = "1/√D" if plan.has_usual_scale else f"{plan.scale:.6g}"
    if not plan.temperature_scale:
        return words
    scale, length = plan.temperature_scale, plan.temperature_length
    return f"{words} · (1 + {scale:g} ln(1 + ⌊position / {length:,}⌋))"


def rope_words(plan: AttentionPlan) -> str:
    rope = plan.rope
    if rope is None:
        return "none"
    words = "RoPE, scaled"
    if rope.base is not None:
        divided = f" ÷ {1 / rope.frequencies[0]:.4g}" if rope.frequencies[0] != 1 else ""
        words = f"RoPE, base {rope.base:,.0f}{divided}"
    part = f" of {rope.rotary_dim} coordinates" if rope.rotary_dim < plan.head_dim else ""
    return words + part


def by_layers(words: Sequence[str]) -> str:
    """`A` if all layers say so, else `A in 3 of 4 layers, B in 1`; "none" is the last."""
    counts = Counter(words)
    first, *others = sorted(counts, key="none".__eq__)
    if not others:
        return first
    return f"{first} in {counts[first]} of {len(words)} layers" + "".join(
        f", {other} in {counts[other]}" for other in others
    )


def stored_formats(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """For every number format of the file: its tensors, numbers and bytes; the largest first."""
    formats: dict[str, dict[str, Any]] = {}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        empty = {"type": info.dtype, "tensors": 0, "numbers": 0, "bytes": 0}
        row = formats.setdefault(info.dtype, empty)
        row["tensors"] += 1
        row["numbers"] += math.prod(info.shape)
        row["bytes"] += info.nbytes
    return sorted(formats.values(), key=lambda row: -int(row["bytes"]))


def tokenizer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Vocabulary, special ids and chat format; {"error": …} if there is no tokenizer."""
    try:
        tokenizer = checkpoint.tokenizer
    except GlassError as error:
        return {"error": str(error)}
    try:
        chat = type(choose_chat_format(checkpoint.chat_template, tokenizer)).__name__
    except TokenizerError:
        chat = None  # a base model
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.bos,
        "stop_ids": sorted(tokenizer.stop_ids),
        "control_tokens": len(tokenizer.specials),
        "chat_format": chat and CHAT_FORMATS[chat],
    }


def sampling_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sampling settings that the files recommend; {"error": …} for a bad value."""
    try:
        found = checkpoint.sampling_defaults
    except GlassError as error:
        return {"error": str(error)}
    return {"text": str(found), **found.values}


def memory_needed(checkpoint: Checkpoint) -> list[dict[str, int]]:
    """Bytes that the engine takes for one conversation, for several lengths up to the longest.

    Empty for models that the engine does not run.
    """
    if checkpoint.architecture.layer_plan is None:
        return []
    config = checkpoint.config
    weights = packing_plan(checkpoint, exact=False, quantize="none").nbytes
    cache = partial(checkpoint.layer_plan.kv_bytes, CACHE_NUMBER["int16"], CACHE_SCALE)
    contexts = [min(FIRST_CONTEXT, config.max_seq_len)]
    while contexts[-1] < config.max_seq_len:
        contexts.append(min(contexts[-1] * CONTEXT_FACTOR, config.max_seq_len))
    return [{"context": n, "weights": weights, "cache": cache(n)} for n in contexts]


# --- validation -----------------------------------------------------------------------------

SLICE_NUMBERS = 1 << 22  # numbers in memory at once: 16 MiB as float32
CHUNK = 1 << 20  # bytes hashed at a time
SAMPLES: tuple[str, ...] = (
    "Hello, world! It's 3.14 o'clock.",
    "Straße, naïve café, Ελληνικά, русский, עברית, العربية, हिन्दी, 日本語, 한국어",
    "def f(x):\n\treturn x  # 10000000\n",
    "🙂👩‍👩‍👧 e\u0301",
)
Bars = Callable[[str, str], Progress | None]  # (title, unit) of a piece of work -> its progress


class Finding(NamedTuple):
    """The result of a check; `ok` is False for a problem."""

    ok: bool
    text: str


def validate(
    path: Path, *, sha256: str = "", bars: Bars = lambda _title, _unit: None
) -> list[Finding]:
    """All findings about the model at `path`, good and bad; a file that cannot be opened is one.

    `sha256`: the hash that its one file must have, if it is known; otherwise checksums inside the
    files are compared, if there are any.
    """
    return list(findings(path, sha256, bars))


def findings(path: Path, sha256: str, bars: Bars) -> Iterator[Finding]:
    try:
        checkpoint = open_checkpoint(path)
    except GlassError as error:
        yield Finding(False, str(error))
        return
    yield Finding(True, f"structure: {len(checkpoint.names)} tensors, all that belong to the model")
    for note in checkpoint.notes:
        yield Finding(True, f"note: {note}")
    yield check_sums(checkpoint, sha256, bars("comparing checksums", "bytes"))
    yield from check_numbers(checkpoint, bars("reading every number", "tensors"))
    try:
        tokenizer = checkpoint.tokenizer
    except GlassError as error:
        yield Finding(False, f"tokenizer: {error}")
    else:
        yield from check_vocabulary(tokenizer, checkpoint.config.vocab_size)
        yield check_chat(checkpoint, tokenizer)
    facts = sampling_facts(checkpoint)
    came = facts.get("error") or facts["text"] or "none recommended"
    yield Finding("error" not in facts, f"sampling: {came}")
    checkpoint.close()


def check_sums(checkpoint: Checkpoint, sha256: str, progress: Progress | None) -> Finding:
    file: Any = checkpoint.file
    if sha256:
        came = file_hash(checkpoint.path, progress)
        expected = "" if came == sha256 else f", expected {sha256}"
        return Finding(came == sha256, f"sha256: {came}{expected}")
    if not hasattr(file, "verify"):
        return Finding(True, f"checksums: none in {Path(checkpoint.path).suffix or 'these'} files")
    try:
        file.verify(progress)
    except GlassError as error:
        return Finding(False, f"checksums: {error}")
    return Finding(True, "checksums: every tensor agrees with its CRC-32")


def file_hash(path: Path, progress: Progress | None) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def check_numbers(checkpoint: Checkpoint, progress: Progress | None) -> Iterator[Finding]:
    """Every weight is finite, and no tensor is all zeros, as a hole in a file would be."""
    fine = True
    for done, name in enumerate(checkpoint.names, start=1):
        if (problem := problem_of(checkpoint, name)) is not None:
            fine = False
            tensor = checkpoint.tensors[name]
            part = "" if tensor.shape == tensor.stored_shape else f" ({name})"
            yield Finding(False, f"{tensor.theirs}{part}: {problem}")
        if progress is not None:
            progress(done, len(checkpoint.names))
    if fine:
        yield Finding(True, "numbers: all finite, no tensor of zeros")


def problem_of(checkpoint: Checkpoint, name: str) -> str | None:
    shape = checkpoint.info(name).shape
    step = max(1, SLICE_NUMBERS // (shape[1] if len(shape) > 1 else 1))
    nan, infinite, zeros = 0, 0, True
    for first in range(0, shape[0], step):
        part = checkpoint.float32(name, slice(first, first + step))
        zeros = zeros and not part.any()
        if not np.isfinite(part).all():
            nan += int(np.isnan(part).sum())
            infinite += int(np.isinf(part).sum())
    checkpoint.release_pages(name)
    if nan or infinite:
        return f"{nan} NaN and {infinite} infinite numbers"
    untrained = name.endswith(".bias")  # a bias is initialized with zeros, and may stay so
    return "all zeros" if zeros and not untrained else None


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> Iterator[Finding]:
    """The vocabulary fits the embeddings, answers can end, and text survives the round trip."""
    size = tokenizer.vocab_size
    gaps = len(tokenizer.gaps)
    unused = max(rows - size, 0) + gaps
    more = f"; {unused:,} have no token and are never chosen" if unused else ""
    text = f"vocabulary: {size - gaps:,} tokens for {rows:,} rows of embeddings{more}"
    yield Finding(size <= rows, text)
    outside = sorted(id for id in tokenizer.stop_ids if id >= rows)
    if outside or not tokenizer.stop_ids:
        yield Finding(False, f"stop ids: {outside or 'none, so answers never end by themselves'}")
    what, samples = f"{len(SAMPLES)} texts in a dozen scripts", SAMPLES
    if isinstance(tokenizer, CharTokenizer):
        what, samples = "all its characters", ("".join(tokenizer.characters),)
    changed = [text for text in samples if tokenizer.decode(tokenizer.encode(text)) != text]
    for text in changed:
        came = tokenizer.decode(tokenizer.encode(text))
        yield Finding(False, f"tokenizer: {text!r} comes back as {came!r}")
    if not changed:
        yield Finding(True, f"tokenizer: {what} come back the same")


def check_chat(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Finding:
    """A conversation can be written; a base model has no way to, and need not."""
    try:
        if checkpoint.chat_template is None:
            return Finding(True, "chat template: none in the file")
        form = choose_chat_format(checkpoint.chat_template, tokenizer)
        ids = form.encode([{"role": "user", "content": "Hello"}], tokenizer)
    except GlassError as error:
        return Finding(False, f"chat template: {error}")
    return Finding(True, f"chat template: a first message becomes {len(ids)} tokens")
