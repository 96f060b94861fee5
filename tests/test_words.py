"""Identifiers of the package are terms of the field, in American spelling: see docs/glossary.md.

Each word below was once a private name in this code base. The value is the term to use instead.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import glassllama

PACKAGE = Path(glassllama.__file__).parent

# Words that are part of no identifier ("thread" and "pool" are parts of ThreadPool).
PARTS = {
    "beds": "wake_locks",
    "beside": "the name of the comparison",
    "bfloats": "act_bf16",
    "chooser": "sampler",
    "contestant": "runner",
    "crew": "thread_pool",
    "essential": "fingerprint",
    "everyone": "all_rows",
    "faults": "errors",
    "foreseen": "user_message",
    "heard": "SIGNALS",
    "judge": "evaluate",
    "judged": "evaluate",
    "kept": "cached, stored, or the name of the thing",
    "learnt": "train",
    "nobody": "NO_…, SENTINEL or Null…",
    "occupy": "lock_run_dir",
    "patience": "SPINS_BEFORE_SLEEP",
    "perhaps": "bitmap_filter",
    "punish": "apply_penalties",
    "recall": "match_prefix",
    "recalled": "cached_tokens",
    "rehearsal": "single_rank_run",
    "said": "counts, text, message",
    "seat": "scratch",
    "seats": "rows_with_scratch",
    "sweep": "run_groups",
    "told": "tokens, arguments",
    "unite": "deduplicate",
    "wanted": "requested, expected, required",
    "weigh": "attention_weights",
    "whom": "the name of the object",
    "wides": "act_q11",
    "wish": "stop_request",
    # British spelling
    "behaviour": "behavior",
    "centre": "center",
    "colour": "color",
    "colours": "colors",
    "dequantise": "dequantize",
    "initialise": "initialize",
    "neighbour": "neighbor",
    "normalise": "normalize",
    "normalised": "normalized",
    "optimiser": "optimizer",
    "optimisers": "optimizers",
    "quantise": "quantize",
    "quantised": "quantized",
    "serialise": "serialize",
    "tokenise": "tokenize",
}
# Whole identifiers; as parts they may be ordinary (step_size, prefill_chunk).
WHOLE = {
    "Answer": "RowState",
    "board": "control_block",
    "Book": "MetricsSink",
    "border": "weighted_select",
    "carry_out": "run_training",
    "certain": "complete",
    "Choice": "SamplerParams",
    "cool": "temperature",
    "Desk": "Buffers",
    "exits": "errors",
    "Family": "Architecture",
    "fit": "match_tensors",
    "going_on": "best_effort_cache",
    "held": "cached, or the name of the thing",
    "held_out": "val",
    "Holding": "DeferredSignals",
    "How": "BackendOptions",
    "initial": "init",
    "journal": "metrics",
    "Known": "VocabTables",
    "lead_first": "rank0_first",
    "listed": "as_list",
    "Made": "StepMetrics, pending",
    "many": "tile_tokens",
    "mine": "share of the worker",
    "Needs": "Roofline",
    "NOTHING": "NO_TOKEN",
    "Place": "Buffer",
    "place": "device, set_parameter, path",
    "Questions": "BenchOptions",
    "Rearranged": "RemappedFile",
    "Record": "LoggedMetrics",
    "require_fit": "match_tensors",
    "room": "workspace, scratch, capacity",
    "Rotation": "RopeTable",
    "same_in_pieces": "batch_invariant",
    "sealed": "checksums",
    "See": "HookFn",
    "Seen": "WordCache",
    "set_out": "prepare_step",
    "settle": "commit",
    "share_out": "make_tiles",
    "take": "claim",
    "take_up": "maybe_resume",
    "talk": "session",
    "Team": "DistContext",
    "Told": "ProgressCounter",
    "TorchOnly": "FileFormat",
    "turn": "rope",
    "turns": "interleaved_merge",
    "Watch": "HookPoint",
    "watched": "is_hooked",
    "Which": "ModelOptions",
}


@cache
def identifiers() -> dict[str, str]:
    """Every name that the package defines: modules, classes, functions, arguments, variables,
    attributes -> where it is defined first."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for name in path.relative_to(PACKAGE).with_suffix("").parts:
            found.setdefault(name, file)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    pass
                case ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                    pass
                case ast.arg(arg=name) | ast.alias(asname=str(name)):
                    pass
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    pass
                case _:
                    continue
            found.setdefault(name, f"{file}:{node.lineno}")
    return found


def words(identifier: str) -> set[str]:
    """Parts of an identifier in lower case: `ThreadPool`, `thread_pool` -> {thread, pool}."""
    parts = re.split(r"_|(?<=[a-z0-9])(?=[A-Z])", identifier)
    return {part.lower() for part in parts if part}


@pytest.mark.parametrize("word", sorted(PARTS))
def test_word_is_in_no_identifier(word: str) -> None:
    found = {name: where for name, where in identifiers().items() if word in words(name)}
    assert not found, f"use {PARTS[word]}"


@pytest.mark.parametrize("word", sorted(WHOLE))
def test_word_is_no_identifier(word: str) -> None:
    found = {name: where for name, where in identifiers().items() if name.lstrip("_") == word}
    assert not found, f"use {WHOLE[word]}"


def test_words_are_split() -> None:
    assert words("_wakeLocks") == {"wake", "locks"}
    assert words("NUM_THREADS") == {"num", "threads"}
