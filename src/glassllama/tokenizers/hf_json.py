"""Byte-level BPE from Hugging Face's `tokenizer.json`: Llama 3, SmolLM, GPT-2, Qwen 2.

The file describes a pipeline: normalizer → pre_tokenizer → model → post_processor, and a decoder.
What is read here is understood whole; any other stage, option or flag is a TokenizerError that
names the field, because leaving it out would change ids. `truncation` and `padding` are no part of
the pipeline: they are settings of the last call before the file was saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.bpe import BYTES, Vocabulary
from glassllama.tokenizers.byte_level import byte_level_vocabulary
from glassllama.tokenizers.split import DIGIT_RUNS, EACH_DIGIT, GPT2, LLAMA3, QWEN2, Split

Json = Mapping[str, Any]

STAGES = {"normalizer", "pre_tokenizer", "model", "post_processor", "decoder"}
FIELDS = STAGES | {"version", "truncation", "padding", "added_tokens"}
KNOWN_PATTERNS = (GPT2, LLAMA3, QWEN2)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. TokenizerError: it does not."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as fault:
        raise TokenizerError(f"{path}: is no JSON ({fault}); download it again") from fault
    if not isinstance(document, dict):
        raise TokenizerError(f"{path}: must hold a JSON object, got {type(document).__name__}")
    return document


def vocabulary_from_json(document: Json) -> Vocabulary:
    """The vocabulary, merges and split of a byte-level tokenizer.json."""
    check_pipeline(document)
    model = take(document, "model", dict)
    vocab = take(model, "vocab", dict, "model.")
    require(all(type(id) is int for id in vocab.values()), "model.vocab", "an id is no number")
    controls, added = added_tokens(document)
    elsewhere = {**controls, **added}
    vocabulary = byte_level_vocabulary(
        written={id: token for token, id in vocab.items() if elsewhere.get(token) != id},
        merges=take(model, "merges", list, "model."),
        controls=controls,
        added=added,
        unused={},
        split=Split(pre_tokenizer(document), normal_form=has_normal_form(document)),
        whole_words=bool(model.get("ignore_merges")),
    )
    complete = all(byte in vocabulary.ids for byte in BYTES)
    require(model.get("unk_token") is None or complete, "model.unk_token", "not supported")
    return vocabulary


def first_token(document: Json) -> int | None:
    """The id that the post-processor puts before every text (begin of text), if it does."""
    stages = listed(document.get("post_processor"), "processors")
    templates = [stage for stage in stages if stage.get("type") == "TemplateProcessing"]
    known = all(stage.get("type") in ("ByteLevel", "TemplateProcessing") for stage in stages)
    require(known and len(templates) <= 1, "post_processor", f"not supported: {stages}")
    if not templates:
        return None
    single, tokens = templates[0].get("single"), templates[0].get("special_tokens")
    match single:
        case [{"Sequence": _}]:
            return None
        case [{"SpecialToken": {"id": str(name)}}, {"Sequence": _}]:
            token = tokens.get(name) if isinstance(tokens, dict) else None
            ids = token.get("ids") if isinstance(token, dict) else None
            if isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int:
                return ids[0]
    raise TokenizerError(
        f"post_processor.single must be one special token with its id, and the text; got {single!r}"
    )


def check_pipeline(document: Json) -> None:
    """Refuse what would change ids or text and is not read here."""
    require(document.keys() <= FIELDS, str(sorted(document.keys() - FIELDS)), "not known")
    model = take(document, "model", dict)
    require(model.get("type", "BPE") == "BPE", "model.type", f"{model.get('type')!r}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        require(not model.get(option), f"model.{option}", f"{model.get(option)!r} not supported")
    decoders = listed(document.get("decoder"), "decoders")
    byte_level = [stage.get("type") for stage in decoders] == ["ByteLevel"]
    require(byte_level, "decoder", "must be ByteLevel")


def has_normal_form(document: Json) -> bool:
    kinds = [stage.get("type") for stage in listed(document.get("normalizer"), "normalizers")]
    require(kinds in ([], ["NFC"]), "normalizer", f"only NFC is supported, got {kinds}")
    return bool(kinds)


def pre_tokenizer(document: Json) -> tuple[str, ...]:
    """The patterns of the stages that split; the last stage must be ByteLevel."""
    stages = listed(document.get("pre_tokenizer"), "pretokenizers")
    kinds = [stage.get("type") for stage in stages]
    require(kinds[-1:] == ["ByteLevel"], "pre_tokenizer", f"must end with ByteLevel, got {kinds}")
    prefix = stages[-1].get("add_prefix_space", True)
    require(not prefix, "pre_tokenizer.add_prefix_space", "not supported")
    patterns = [split_pattern(stage) for stage in stages[:-1]]
    return (*patterns, GPT2) if stages[-1].get("use_regex", True) else tuple(patterns)


def split_pattern(stage: Json) -> str:
    match stage:
        case {"type": "Digits", "individual_digits": each}:
            return EACH_DIGIT if each else DIGIT_RUNS
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"} if (
            pattern in KNOWN_PATTERNS and not stage.get("invert")
        ):
            return pattern
    raise TokenizerError(
        f"pre_tokenizer: stage {stage!r} is not known; known are ByteLevel, Digits "
        "and Split with the patterns of GPT-2, Llama 3 and Qwen 2"
    )


def added_tokens(document: Json) -> tuple[dict[str, int], dict[str, int]]:
    """Text → id of the control tokens, and of those that are read from any text."""
    kinds: tuple[dict[str, int], dict[str, int]] = {}, {}
    tokens = document.get("added_tokens") or []
    require(isinstance(tokens, list), "added_tokens", "must be a list")
    for token in tokens:
        match token:
            case {"id": int(id), "content": str(text), "special": bool(special)}:
                flags = [f for f in ("lstrip", "rstrip", "single_word") if token.get(f)]
                if token.get("normalized") and has_normal_form(document):
                    flags.append("normalized")
                require(not flags, f"added token {text!r}", f"{flags} not supported")
                kinds[0 if special else 1][text] = id
            case _:
                require(False, "added_tokens", f"{token!r} is no token")
    return kinds


def listed(stage: Any, name: str) -> list[dict[str, Any]]:
    """A stage and its list of stages are both a list: none, one, or a Sequence's."""
    inner = stage.get(name) if isinstance(stage, dict) and stage.get("type") == "Sequence" else None
    stages = inner if isinstance(inner, list) else [] if stage is None else [stage]
    require(all(isinstance(s, dict) for s in stages), name, "must be objects")
    return stages


def take(mapping: Json, field: str, kind: type, where: str = "") -> Any:
    value = mapping.get(field)
    require(isinstance(value, kind), where + field, f"must be a {kind.__name__}")
    return value


def require(true: bool, field: str, problem: str) -> None:
    if not true:
        raise TokenizerError(f"{field}: {problem}")
