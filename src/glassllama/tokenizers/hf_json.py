"""Tokenizers from Hugging Face's `tokenizer.json`: any BPE whose stages are known.

The file describes normalizer → pre_tokenizer → model → post_processor, and a decoder. A byte-level
file with a known split (Llama 3, SmolLM, GPT-2, Qwen 2) becomes a `Vocabulary`; any other becomes a
`Pipeline`, which is run stage by stage. An unknown field or option is a TokenizerError that names
it, because leaving it out would change ids. `truncation` and `padding` are not part of the
pipeline: they are settings of the last call before the file was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import Fields, is_whole
from glassllama.tokenizers.backend import PYTHON, BPEBackend
from glassllama.tokenizers.bpe import BytePairTokenizer
from glassllama.tokenizers.byte_level import BYTE_CHARACTERS, byte_level_vocabulary, to_bytes
from glassllama.tokenizers.files import LARGEST_VOCABULARY, size_of_vocabulary
from glassllama.tokenizers.pipeline import CharacterBPE, Merges, Pipeline, PipelineTokenizer
from glassllama.tokenizers.pipeline_stages import normalizer, pre_tokenizer, stage_list
from glassllama.tokenizers.pretokenizer import DIGIT_RUNS, EACH_DIGIT, GPT2, LLAMA3, QWEN2, Split
from glassllama.tokenizers.sentencepiece import BYTE_PIECE, SPACE_SYMBOL
from glassllama.tokenizers.special_tokens import (
    AddedToken,
    AddedTokens,
    is_special,
    stop_ids_by_name,
)
from glassllama.tokenizers.vocabulary import Vocabulary

Json = Mapping[str, Any]

STAGES = {"normalizer", "pre_tokenizer", "model", "post_processor", "decoder"}
FIELDS = STAGES | {"version", "truncation", "padding", "added_tokens"}
CLS_AND_SEP = ("RobertaProcessing", "BertProcessing")  # post-processors with both ends
KNOWN_PATTERNS = (GPT2, LLAMA3, QWEN2)


def tokenizer_from_json(
    document: Json, backend: BPEBackend = PYTHON
) -> BytePairTokenizer | PipelineTokenizer:
    """The tokenizer of a tokenizer.json. TokenizerError names what is not supported."""
    if not has_known_split(document):
        return pipeline_from_json(document, backend)
    vocabulary = vocabulary_from_json(document)
    ids = document["model"]["vocab"] | {token.text: token.id for token in vocabulary.added_tokens}
    bos, _ = text_ends(document)
    stop_ids = stop_ids_by_name(ids)
    return BytePairTokenizer(vocabulary, bos=bos, stop_ids=stop_ids, backend=backend)


def root(document: Json) -> Fields:
    """The whole file. TokenizerError: an unknown field or kind of model."""
    fields = Fields("tokenizer.json", document, TokenizerError)
    if unknown := document.keys() - FIELDS:
        raise TokenizerError(f"tokenizer.json: {quoted(min(unknown))} is not known")
    model = fields.object("model")
    if model.text("type", "BPE") != "BPE":
        model.refuse("type", "BPE")
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.text(option, ""):
            model.refuse(option, "empty")
    if model.number("dropout", 0.0):
        model.refuse("dropout", "null")
    return fields


def token_ids(document: Fields) -> dict[str, int]:
    """Text → id of `model.vocab`."""
    vocab = document.object("model").object("vocab")
    ids: dict[str, int] = dict(vocab.values)
    for text, id in ids.items():
        if not is_whole(id) or not 0 <= id < LARGEST_VOCABULARY:
            vocab.refuse(text, f"an id from 0 to {LARGEST_VOCABULARY - 1}")
    if len({*ids.values()}) < len(ids):
        raise TokenizerError("tokenizer.json: model.vocab gives an id to two tokens")
    return ids


def merge_pairs(document: Fields) -> Iterator[tuple[str, str]]:
    """`model.merges` in order, each written "a b" or ["a", "b"]."""
    for number, merge in enumerate(document.object("model").items("merges")):
        if isinstance(merge, str) and merge.startswith("#version"):
            continue  # the first line of a merges.txt
        pair = merge.split(" ") if isinstance(merge, str) else merge
        match pair:
            case [str(left), str(right)]:
                yield left, right
            case _:
                raise TokenizerError(
                    f"tokenizer.json: merges: number {number} must be two tokens, "
                    f"got {quoted(merge)}"
                )


def checked_merges(document: Fields, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The merges. TokenizerError: one names a token that is not in the vocabulary."""
    for number, (left, right) in enumerate(merge_pairs(document)):
        if not {left, right, left + right} <= vocab.keys():
            raise TokenizerError(
                f"tokenizer.json: merges: number {number} must be two tokens that make a third, "
                f"all in the vocabulary; got {quoted([left, right])}"
            )
        yield left, right


def added_tokens(document: Fields, vocab: Mapping[str, int]) -> list[AddedToken]:
    """The added tokens. As in tokenizers, a text of the vocabulary has its id there."""
    found: dict[str, AddedToken] = {}
    for number, value in enumerate(document.items("added_tokens", ())):
        token = Fields(f"tokenizer.json: added_tokens[{number}]", value, TokenizerError)
        text = token.text("content")
        id = token.whole("id", least=0, most=LARGEST_VOCABULARY - 1)
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        special = token.boolean("special") or is_special(text)
        if not text:
            token.refuse("content", "a text of at least one character")
        found[text] = AddedToken(
            id=vocab.get(text, id), text=text, is_special=special,
            **{flag: token.boolean(flag, False) for flag in flags},
        )  # fmt: skip
    ids = {token.id: text for text, token in found.items()}
    if twice := [token for text, token in found.items() if ids[token.id] != text]:
        raise TokenizerError(f"tokenizer.json: two added tokens have the id {twice[0].id}")
    return [*found.values()]


# Byte-level files with a known split


def has_known_split(document: Json) -> bool:
    """Whether a file can become a `Vocabulary`; else it is a `Pipeline`."""
    fields = root(document)
    model, vocab = fields.object("model"), token_ids(fields)
    specials = {token.text for token in added_tokens(fields, vocab) if token.is_special}
    complete = vocab.keys() >= BYTE_CHARACTERS
    makes_special = not specials.isdisjoint(vocab) and any(
        left + right in specials for left, right in merge_pairs(fields)
    )
    types = [stage.text("type") for stage in stage_list(fields, "normalizer", "normalizers")]
    return (
        types in ([], ["NFC"])
        and known_patterns(fields) is not None
        and not makes_special
        and not specials & BYTE_CHARACTERS
        and not model.boolean("byte_fallback", False)
        and (complete or model.text("unk_token", None) is None)
    )


def vocabulary_from_json(document: Json) -> Vocabulary:
    """The vocabulary, merges and split of a file that `has_known_split`."""
    fields = root(document)
    vocab = token_ids(fields)
    added = added_tokens(fields, vocab)
    check_byte_level_decoder(fields)
    patterns = known_patterns(fields)
    assert patterns is not None
    added_texts = {token.text for token in added}
    normalizes = bool(stage_list(fields, "normalizer", "normalizers"))
    return byte_level_vocabulary(
        tokens={id: token for token, id in vocab.items() if token not in added_texts},
        merges=checked_merges(fields, vocab),
        added_tokens=added,
        unused={},
        split=Split(patterns, normalize_nfc=normalizes),
        ignore_merges=bool(fields.object("model").boolean("ignore_merges", False)),
        mergeable=vocab,
    )


def known_patterns(document: Fields) -> tuple[str, ...] | None:
    """The patterns of the pre-tokenizers, if they are known and the last stage is ByteLevel."""
    stages = stage_list(document, "pre_tokenizer", "pretokenizers")
    if not stages or stages[-1].text("type") != "ByteLevel":
        return None
    if stages[-1].boolean("add_prefix_space", True):
        return None
    known = [known_pattern(stage) for stage in stages[:-1]]
    if stages[-1].boolean("use_regex", True):
        known.append(GPT2)
    found = tuple(pattern for pattern in known if pattern is not None)
    return found if found and len(found) == len(known) else None


def known_pattern(stage: Fields) -> str | None:
    match stage.values:
        case {"type": "Digits"}:
            return EACH_DIGIT if stage.boolean("individual_digits", False) else DIGIT_RUNS
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"} if (
            pattern in KNOWN_PATTERNS and not stage.boolean("invert", False)
        ):
            return pattern
    return None


def check_byte_level_decoder(document: Fields) -> None:
    types = [stage.text("type") for stage in stage_list(document, "decoder", "decoders")]
    if types != ["ByteLevel"]:
        raise TokenizerError(f"tokenizer.json: decoder must be ByteLevel, got {quoted(types)}")


# The post-processor


def text_ends(document: Json) -> tuple[int | None, int | None]:
    """The ids that the post-processor puts before and after every text."""
    stages = stage_list(
        Fields("tokenizer.json", document, TokenizerError), "post_processor", "processors"
    )
    templates = [stage for stage in stages if stage.text("type") != "ByteLevel"]
    for stage in templates:
        if stage.text("type") not in ("TemplateProcessing", *CLS_AND_SEP) or len(templates) > 1:
            stage.refuse("type", f"ByteLevel, or one of TemplateProcessing {' '.join(CLS_AND_SEP)}")
    if not templates:
        return None, None
    if templates[0].text("type") in CLS_AND_SEP:
        return named_end(templates[0], "cls"), named_end(templates[0], "sep")
    match [*templates[0].items("single")]:
        case [{"Sequence": _}]:
            names: tuple[Any, Any] = None, None
        case [{"SpecialToken": {"id": str(first)}}, {"Sequence": _}]:
            names = first, None
        case [{"Sequence": _}, {"SpecialToken": {"id": str(last)}}]:
            names = None, last
        case [
            {"SpecialToken": {"id": str(first)}},
            {"Sequence": _},
            {"SpecialToken": {"id": str(last)}},
        ]:
            names = first, last
        case _:
            templates[0].refuse(
                "single", "the text, with at most one special token before and one behind it"
            )
    begin, end = (None if name is None else template_id(templates[0], name) for name in names)
    return begin, end


def named_end(stage: Fields, name: str) -> int:
    """The id of a pair ["<s>", 0]."""
    pair = [*stage.items(name)]
    if len(pair) != 2 or not is_whole(pair[1]) or not 0 <= pair[1] < LARGEST_VOCABULARY:
        stage.refuse(name, "a token and its id")
    return int(pair[1])


def template_id(template: Fields, name: str) -> int:
    ids = template.object("special_tokens").object(name).items("ids", of="whole")
    if len(ids) != 1:
        template.refuse("special_tokens", f"objects with one id each, also for {quoted(name)}")
    return int(ids[0])


# Other pipelines


def pipeline_from_json(document: Json, backend: BPEBackend = PYTHON) -> PipelineTokenizer:
    """The tokenizer of any supported tokenizer.json, run stage by stage."""
    fields = root(document)
    vocab = token_ids(fields)
    added = added_tokens(fields, vocab)
    normalizers = stage_list(fields, "normalizer", "normalizers")
    pre_tokenizers = stage_list(fields, "pre_tokenizer", "pretokenizers")
    is_byte_level = any(s.text("type") == "ByteLevel" for s in (*normalizers, *pre_tokenizers))
    if is_byte_level:
        check_byte_level_decoder(fields)
    merges = {
        (vocab[left], vocab[right]): (rank, vocab[left + right])
        for rank, (left, right) in enumerate(checked_merges(fields, vocab))
    }
    bpe = _character_bpe(fields.object("model"), vocab, merges, is_byte_level, backend)
    decoders = stage_list(fields, "decoder", "decoders")
    pipeline = Pipeline(
        added=AddedTokens(added, normalizer(normalizers)),
        pre_tokenizer=pre_tokenizer(pre_tokenizers),
        bpe=bpe,
        bpe_without_specials=bpe.without({token.id for token in added if token.is_special}),
        token_bytes=_token_bytes(vocab, added, bpe.byte_ids, is_byte_level),
        hides_specials=not is_byte_level,
        drops_prefix=not is_byte_level and _drops_prefix(decoders),
    )
    bos, eos = text_ends(document)
    stop_ids = stop_ids_by_name({**vocab, **{token.text: token.id for token in added}})
    if eos is not None:
        stop_ids.add(eos)
    return PipelineTokenizer(pipeline, bos=bos, stop_ids=stop_ids)


def _character_bpe(
    model: Fields,
    vocab: Mapping[str, int],
    merges: Merges,
    is_byte_level: bool,
    backend: BPEBackend,
) -> CharacterBPE:
    byte_ids: dict[int, int] = {}
    if model.boolean("byte_fallback", False):
        byte_ids = {int(t[3:5], 16): id for t, id in vocab.items() if BYTE_PIECE.fullmatch(t)}
    unknown = model.text("unk_token", None)
    complete = len(byte_ids) == 256 or (is_byte_level and vocab.keys() >= BYTE_CHARACTERS)
    if unknown is not None and unknown not in vocab and not complete:
        model.refuse("unk_token", "a token of the vocabulary")
    return CharacterBPE(
        ids=vocab,
        merges=merges,
        byte_ids=byte_ids,
        unknown=None if unknown is None else vocab.get(unknown),
        fuse_unknown=bool(model.boolean("fuse_unk", False)),
        ignore_merges=bool(model.boolean("ignore_merges", False)),
        backend=backend,
    )


def _token_bytes(
    vocab: Mapping[str, int],
    added: Sequence[AddedToken],
    byte_ids: Mapping[int, int],
    is_byte_level: bool,
) -> list[bytes | None]:
    added_ids = {token.id for token in added}
    found: list[bytes | None] = [None] * size_of_vocabulary({*vocab.values(), *added_ids})
    for text, id in vocab.items():
        if not is_byte_level:
            found[id] = _utf8(text.replace(SPACE_SYMBOL, " "))
        elif id not in added_ids:
            found[id] = to_bytes(text) if {*text} <= BYTE_CHARACTERS else _utf8(text)
    for byte, id in byte_ids.items():
        found[id] = bytes([byte])
    for token in added:
        if found[token.id] is not None and vocab.get(token.text) != token.id:
            raise TokenizerError(
                f"tokenizer.json: vocabulary: id {token.id} is a token's, and also that of the "
                f"added token {quoted(token.text)}"
            )
        found[token.id] = _utf8(token.text)
    return found


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _drops_prefix(decoders: Sequence[Fields]) -> bool:
    """Whether decoding drops a space at the start; refuses decoders that do anything else."""
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spaces = {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}
    drops = False
    for decoder in decoders:
        type = decoder.text("type")
        if decoder.values == strip:
            drops = True
        elif type == "Metaspace":
            drops = decoder.text("prepend_scheme", "always") != "never"
        elif decoder.values != spaces and type not in ("ByteFallback", "Fuse"):
            decoder.refuse("type", f"one of ByteFallback, Fuse, Metaspace, {strip}, {spaces}")
    if not decoders:
        raise TokenizerError(
            "tokenizer.json: decoder is missing: without one, words have no blanks"
        )
    return drops
