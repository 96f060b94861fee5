"""SentencePiece-style vocabularies out of tokenizer.model, tokenizer.json and GGUF metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.byte_level import LARGEST_VOCABULARY, is_control
from glassllama.tokenizers.ends import END_OF_ANSWER, end_ids
from glassllama.tokenizers.hf_json import Json, first_token, listed, require, take
from glassllama.tokenizers.pieces import BLANK, Kind, Pieces, SentencePieceTokenizer
from glassllama.tokenizers.protobuf import BPE, MODEL_TYPES, SentencePieceModel, read_model

__all__ = [
    "SentencePieceTokenizer",
    "read_sentencepiece",
    "sentencepiece_from_gguf",
    "sentencepiece_from_hf_json",
]

# Gemma's files flag the marks of turns as plain additions. Were they read from any text, a user
# could end his message with them and speak as the model: they are controls, as in every reader.
START_OF_TURN = "<start_of_turn>"
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


# tokenizer.model


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model of type BPE.

    TokenizerError: no such file, another type (unigram), or a normalization other than identity.
    """
    model = read_model(path)
    try:
        _check_supported(model)
        texts = [piece.text for piece in model.pieces]
        return SentencePieceTokenizer(
            Pieces(
                texts=tuple(texts),
                kinds=_kinds(texts, [piece.kind for piece in model.pieces]),
                scores=tuple(piece.score for piece in model.pieces),
                prefix="every" if model.add_dummy_prefix else "never",
                trim=model.remove_extra_whitespaces,
                drop_prefix=model.add_dummy_prefix or model.remove_extra_whitespaces,
                unknown_text=model.unknown_text,
            ),
            bos=model.bos_id if model.bos_id >= 0 else None,
            stop_ids=_ends(texts, model.eos_id if model.eos_id >= 0 else None),
        )
    except TokenizerError as fault:
        raise TokenizerError(f"{path}: {fault}") from fault


def _check_supported(model: SentencePieceModel) -> None:
    kind = MODEL_TYPES.get(model.model_type, model.model_type)
    require(model.model_type == BPE, "trainer_spec.model_type", f"want bpe, got {kind}")
    require(
        not model.has_character_map,
        "normalizer_spec.precompiled_charsmap",
        f"normalization {model.normalization!r} is not supported, only identity is",
    )
    require(model.escape_whitespaces, "normalizer_spec.escape_whitespaces", "false not supported")
    require(not model.blank_at_word_end, "trainer_spec.treat_whitespace_as_suffix", "not supported")
    has_bytes = any(piece.kind == Kind.BYTE for piece in model.pieces)
    require(
        model.byte_fallback == has_bytes,
        "trainer_spec.byte_fallback",
        f"is {model.byte_fallback}, but pieces for bytes are {'there' if has_bytes else 'missing'}",
    )


# GGUF


def sentencepiece_from_gguf(metadata: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer of GGUF metadata whose `tokenizer.ggml.model` is "llama".

    Where keys are missing, llama.cpp's rules hold: bos and a blank are put before a text.
    TokenizerError names the key that is missing or wrong.
    """

    def of(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    texts = [str(text) for text in _list(of("tokens"), "tokens")]
    kinds = [int(kind) for kind in _list(of("token_type"), "token_type", len(texts))]
    scores = tuple(float(score) for score in _list(of("scores"), "scores", len(texts)))
    require(not of("precompiled_charsmap"), "tokenizer.ggml.precompiled_charsmap", "not supported")
    prefix = bool(of("add_space_prefix", True))
    return SentencePieceTokenizer(
        Pieces(
            texts=tuple(texts),
            kinds=_kinds(texts, kinds),
            scores=scores,
            prefix="every" if prefix else "never",
            drop_prefix=prefix,
        ),
        bos=_number(of("bos_token_id", 1), "bos_token_id") if of("add_bos_token", True) else None,
        stop_ids=_ends(texts, _number(of("eos_token_id", 2), "eos_token_id"))
        | {
            _number(of(key), key) for key in ("eot_token_id", "eom_token_id") if of(key) is not None
        },
    )


def _list(values: Any, name: str, length: int | None = None) -> Sequence[Any]:
    field = f"tokenizer.ggml.{name}"
    require(values is not None, field, "is missing: the file has no whole vocabulary")
    if length is not None:
        require(len(values) == length, field, f"{len(values)} for {length} tokens")
    found: Sequence[Any] = values
    return found


def _number(value: Any, name: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise TokenizerError(f"tokenizer.ggml.{name}: want an id, got {value!r}") from None


def _kinds(texts: Sequence[str], numbers: Sequence[int]) -> tuple[Kind, ...]:
    known = {kind.value for kind in Kind}
    if wrong := set(numbers) - known:
        raise TokenizerError(f"token types {sorted(wrong)} are not known, only 1 … 6 are")
    kinds = list(map(Kind, numbers))
    for id, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if kind == Kind.USER_DEFINED and _is_control(text):
            kinds[id] = Kind.CONTROL
        if kind == Kind.BYTE and not BYTE_PIECE.fullmatch(text):
            raise TokenizerError(f"piece {id}: a byte is written <0x00> … <0xFF>, got {text!r}")
        if kind in (Kind.NORMAL, Kind.USER_DEFINED, Kind.CONTROL) and not text:
            raise TokenizerError(f"piece {id}: is empty")
    return tuple(kinds)


def _is_control(text: str) -> bool:
    return text == START_OF_TURN or is_control(text)


def _ends(texts: Sequence[str | None], eos: int | None) -> set[int]:
    ends = end_ids({text: id for id, text in enumerate(texts) if text in END_OF_ANSWER})
    return ends if eos is None else ends | {eos}


# tokenizer.json


def sentencepiece_from_hf_json(document: Json) -> SentencePieceTokenizer:
    """The tokenizer of a tokenizer.json whose model is BPE with `byte_fallback`.

    Its merges rank pairs by their order. TokenizerError names the stage or option that is not
    understood, because leaving it out would change ids.
    """
    texts, kinds = _hf_pieces(document)
    prefixing, cut_at_blanks = _blanks(document)
    return SentencePieceTokenizer(
        Pieces(
            texts=texts,
            kinds=kinds,
            merges=_hf_merges(document),
            cut_at_blanks=cut_at_blanks,
            drop_prefix=_drops_blank(document),
            added_first=True,
            **prefixing,
        ),
        bos=first_token(document),
        stop_ids=_ends(texts, None),
    )


def _hf_pieces(document: Json) -> tuple[tuple[str | None, ...], tuple[Kind, ...]]:
    model = take(document, "model", dict)
    require(model.get("type") == "BPE", "model.type", f"{model.get('type')!r}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        require(not model.get(option), f"model.{option}", f"{model.get(option)!r} not supported")
    vocab = take(model, "vocab", dict, "model.")
    added = _hf_added(document)
    kinds_of = dict.fromkeys(vocab, Kind.NORMAL)
    kinds_of |= {text: Kind.BYTE for text in vocab if BYTE_PIECE.fullmatch(text)}
    if (unknown := model.get("unk_token")) is not None:
        kinds_of[unknown] = Kind.UNKNOWN
    ids = {**vocab, **{text: id for text, (id, _) in added.items()}}
    kinds_of |= {text: kind for text, (_, kind) in added.items() if text != unknown}
    largest = max(ids.values(), default=-1)
    valid = all(type(id) is int and 0 <= id < LARGEST_VOCABULARY for id in ids.values())
    require(valid and len({*ids.values()}) == len(ids), "model.vocab", "ids are not unique numbers")
    texts: list[str | None] = [None] * (largest + 1)
    kinds = [Kind.UNUSED] * (largest + 1)
    for text, id in ids.items():
        texts[id], kinds[id] = text, kinds_of[text]
    return tuple(texts), tuple(kinds)


def _hf_added(document: Json) -> dict[str, tuple[int, Kind]]:
    prefixes = any(stage.get("type") == "Prepend" for stage in _normalizers(document))
    found: dict[str, tuple[int, Kind]] = {}
    for token in document.get("added_tokens") or []:
        match token:
            case {"id": int(id), "content": str(text), "special": bool(special)} if text:
                flags = [f for f in ("lstrip", "rstrip", "single_word") if token.get(f)]
                if token.get("normalized") and prefixes and not special:
                    flags.append("normalized")  # then it is looked for with ▁ in front
                require(not flags, f"added token {text!r}", f"{flags} not supported")
                is_control = special or _is_control(text)
                found[text] = (id, Kind.CONTROL if is_control else Kind.USER_DEFINED)
            case _:
                require(False, "added_tokens", f"{token!r} is no token")
    return found


def _hf_merges(document: Json) -> dict[tuple[bytes, bytes], int]:
    vocab, ranks = document["model"]["vocab"], {}
    for rank, merge in enumerate(take(document["model"], "merges", list, "model.")):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        match pair:
            case [str(left), str(right)] if {left, right, left + right} <= vocab.keys():
                ranks[left.encode(), right.encode()] = rank
            case _:
                require(False, "model.merges", f"{merge!r} does not join two pieces to a third")
    return ranks


def _normalizers(document: Json) -> list[dict[str, Any]]:
    return listed(document.get("normalizer"), "normalizers")


def _blanks(document: Json) -> tuple[dict[str, Any], bool]:
    """How blanks become ▁, as `Pieces` says it; and whether words are cut before each."""
    stages = _normalizers(document)
    prepends = stages[:1] == [{"type": "Prepend", "prepend": BLANK}]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    pre = listed(document.get("pre_tokenizer"), "pretokenizers")
    if stages[prepends:] == [replaces]:
        by_then_there_are_none = {"type": "Split", "pattern": {"String": " "}}  # Gemma's
        harmless = all(stage.items() >= by_then_there_are_none.items() for stage in pre)
        require(harmless, "pre_tokenizer", f"not supported: {pre}")
        return {"prefix": "every" if prepends else "never"}, False
    metaspace = len(pre) == 1 and pre[0].get("type") == "Metaspace"
    known = not stages and metaspace and pre[0].get("replacement") == BLANK
    require(known, "normalizer, pre_tokenizer", f"not supported: {stages}, {pre}")
    old_name = "always" if pre[0].get("add_prefix_space", True) else "never"
    scheme = pre[0].get("prepend_scheme", old_name)
    prefixes = {"always": "every", "first": "first", "never": "never"}
    require(scheme in prefixes, "pre_tokenizer.prepend_scheme", f"not supported: {scheme!r}")
    prefixing = {"prefix": prefixes[scheme], "prefix_before_blank": False}
    return prefixing, bool(pre[0].get("split", True))


def _drops_blank(document: Json) -> bool:
    """Whether decoding drops a blank at the beginning; refuses decoders that do anything else."""
    stages = listed(document.get("decoder"), "decoders")
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    drops = False
    for stage in stages:
        if stage == strip:
            drops = True
        elif stage.get("type") == "Metaspace":
            drops = stage.get("prepend_scheme", "always") != "never"
        else:
            blank = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
            known = stage == blank or stage.get("type") in ("ByteFallback", "Fuse")
            require(known, "decoder", f"not supported: {stage}")
    return drops
