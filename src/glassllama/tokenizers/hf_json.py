"""Byte-level BPE from Hugging Face's `tokenizer.json`, and what all such files have in common.

The file describes a pipeline: normalizer → pre_tokenizer → model → post_processor, and a decoder.
A pipeline whose split is compiled (Llama 3, SmolLM, GPT-2, Qwen 2) is read here; any other is run
stage by stage (pipeline_json.py). What neither understands is a TokenizerError that names the
field, because leaving it out would change ids. `truncation` and `padding` are no part of the
pipeline: they are settings of the last call before the file was saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import Fields, is_whole
from glassllama.tokenizers.added import AddedToken
from glassllama.tokenizers.bpe import Vocabulary
from glassllama.tokenizers.byte_level import (
    WRITTEN_BYTES,
    byte_level_vocabulary,
    is_control,
)
from glassllama.tokenizers.pretokenizer import DIGIT_RUNS, EACH_DIGIT, GPT2, LLAMA3, QWEN2, Split
from glassllama.tokenizers.rows import LARGEST_VOCABULARY
from glassllama.tokenizers.stages import stage_list

Json = Mapping[str, Any]

STAGES = {"normalizer", "pre_tokenizer", "model", "post_processor", "decoder"}
FIELDS = STAGES | {"version", "truncation", "padding", "added_tokens"}
CLS_AND_SEP = ("RobertaProcessing", "BertProcessing")  # post-processors with both ends
KNOWN_PATTERNS = (GPT2, LLAMA3, QWEN2)


def root(document: Json) -> Fields:
    """The whole file. TokenizerError: a field or a kind of model that is not known."""
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
    """`model.merges` in their order, each written "a b" or ["a", "b"]."""
    for number, merge in enumerate(document.object("model").items("merges")):
        if isinstance(merge, str) and merge.startswith("#version"):
            continue  # the first line of the merges.txt that a file was made of
        pair = merge.split(" ") if isinstance(merge, str) else merge
        match pair:
            case [str(left), str(right)]:
                yield left, right
            case _:
                raise TokenizerError(
                    f"tokenizer.json: merges: number {number} must be two tokens, "
                    f"got {quoted(merge)}"
                )


def added_tokens(document: Fields, vocab: Mapping[str, int]) -> list[AddedToken]:
    """The file's added tokens. A text of the vocabulary has its id there, as in tokenizers."""
    found: dict[str, AddedToken] = {}
    for number, value in enumerate(document.items("added_tokens", ())):
        token = Fields(f"tokenizer.json: added_tokens[{number}]", value, TokenizerError)
        text = token.text("content")
        id = token.whole("id", least=0, most=LARGEST_VOCABULARY - 1)
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        reads_as_control = token.boolean("special") or is_control(text)
        if not text:
            token.refuse("content", "a text of at least one character")
        found[text] = AddedToken(
            id=vocab.get(text, id), text=text, is_control=reads_as_control,
            **{flag: token.boolean(flag, False) for flag in flags},
        )  # fmt: skip
    ids = {token.id: text for text, token in found.items()}
    if twice := [token for text, token in found.items() if ids[token.id] != text]:
        raise TokenizerError(f"tokenizer.json: two added tokens have the id {twice[0].id}")
    return [*found.values()]


def has_compiled_split(document: Json) -> bool:
    """Whether a file is byte-level with a split that compiled loops know; else it is a pipeline."""
    fields = root(document)
    model, vocab = fields.object("model"), token_ids(fields)
    controls = {token.text for token in added_tokens(fields, vocab) if token.is_control}
    complete = vocab.keys() >= WRITTEN_BYTES
    makes_control = not controls.isdisjoint(vocab) and any(
        left + right in controls for left, right in merge_pairs(fields)
    )
    kinds = [stage.text("type") for stage in stage_list(fields, "normalizer", "normalizers")]
    return (
        kinds in ([], ["NFC"])
        and patterns(fields) is not None
        and not makes_control
        and not controls & WRITTEN_BYTES
        and not model.boolean("byte_fallback", False)
        and (complete or model.text("unk_token", None) is None)
    )


def vocabulary_from_json(document: Json) -> Vocabulary:
    """The vocabulary, merges and split of a file that `has_compiled_split`."""
    fields = root(document)
    vocab = token_ids(fields)
    tokens = added_tokens(fields, vocab)
    check_byte_level_decoder(fields)
    split = patterns(fields)
    assert split is not None
    elsewhere = {token.text for token in tokens}
    return byte_level_vocabulary(
        written={id: token for token, id in vocab.items() if token not in elsewhere},
        merges=checked_merges(fields, vocab),
        controls=of_kind(tokens, is_control=True),
        added=of_kind(tokens, is_control=False),
        unused={},
        split=Split(split, normal_form=bool(stage_list(fields, "normalizer", "normalizers"))),
        whole_words=bool(fields.object("model").boolean("ignore_merges", False)),
        flagged=tokens,
        in_words=vocab,
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


def check_byte_level_decoder(document: Fields) -> None:
    kinds = [stage.text("type") for stage in stage_list(document, "decoder", "decoders")]
    if kinds != ["ByteLevel"]:
        raise TokenizerError(f"tokenizer.json: decoder must be ByteLevel, got {quoted(kinds)}")


def first_token(document: Json) -> int | None:
    """The id that the post-processor puts before every text (begin of text), if it does."""
    return text_ends(document)[0]


def text_ends(document: Json) -> tuple[int | None, int | None]:
    """The ids that the post-processor puts before and behind every text."""
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


def patterns(document: Fields) -> tuple[str, ...] | None:
    """The patterns of the stages that split, where these are known and the last is ByteLevel."""
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


def of_kind(tokens: Iterable[AddedToken], *, is_control: bool) -> dict[str, int]:
    return {token.text: token.id for token in tokens if token.is_control == is_control}
