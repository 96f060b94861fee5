"""A `PipelineTokenizer` out of a tokenizer.json: any BPE whose stages are known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import Fields
from glassllama.tokenizers.added import AddedToken, AddedTokens
from glassllama.tokenizers.byte_level import WRITTEN_BYTES, to_bytes
from glassllama.tokenizers.character_bpe import CharacterBPE, Merges
from glassllama.tokenizers.ends import end_ids
from glassllama.tokenizers.hf_json import (
    Json,
    added_tokens,
    check_byte_level_decoder,
    checked_merges,
    root,
    text_ends,
    token_ids,
)
from glassllama.tokenizers.pieces import BLANK
from glassllama.tokenizers.pipeline import Pipeline, PipelineTokenizer
from glassllama.tokenizers.rows import rows_of
from glassllama.tokenizers.stages import normalizer, pre_tokenizer, stage_list

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def pipeline_from_json(document: Json) -> PipelineTokenizer:
    """The tokenizer of any supported tokenizer.json.

    TokenizerError names the stage, option or field that is not understood.
    """
    fields = root(document)
    vocab = token_ids(fields)
    tokens = added_tokens(fields, vocab)
    normalizers = stage_list(fields, "normalizer", "normalizers")
    splits = stage_list(fields, "pre_tokenizer", "pretokenizers")
    is_byte_level = "ByteLevel" in {stage.text("type") for stage in (*normalizers, *splits)}
    if is_byte_level:
        check_byte_level_decoder(fields)
    controls = {token.id for token in tokens if token.is_control}
    merges = {
        (vocab[left], vocab[right]): (rank, vocab[left + right])
        for rank, (left, right) in enumerate(checked_merges(fields, vocab))
    }
    words = _words(fields.object("model"), vocab, merges, is_byte_level)
    pipeline = Pipeline(
        added=AddedTokens(tokens, normalizer(normalizers)),
        split=pre_tokenizer(splits),
        words=words,
        plain_words=words.without(controls),
        token_bytes=_token_bytes(vocab, tokens, words.bytes_of, is_byte_level),
        hides_controls=not is_byte_level,
        drops_blank=not is_byte_level and _drops_blank(stage_list(fields, "decoder", "decoders")),
    )
    begin, end = text_ends(document)
    texts = {**vocab, **{token.text: token.id for token in tokens}}
    ends = end_ids(texts)
    return PipelineTokenizer(pipeline, bos=begin, stop_ids=ends if end is None else ends | {end})


def _words(
    model: Fields, vocab: Mapping[str, int], merges: Merges, is_byte_level: bool
) -> CharacterBPE:
    bytes_of: dict[int, int] = {}
    if model.boolean("byte_fallback", False):
        bytes_of = {int(t[3:5], 16): id for t, id in vocab.items() if BYTE_PIECE.fullmatch(t)}
    name = model.text("unk_token", None)
    complete = len(bytes_of) == 256 or (is_byte_level and vocab.keys() >= WRITTEN_BYTES)
    if name is not None and name not in vocab and not complete:
        model.refuse("unk_token", "a token of the vocabulary")
    return CharacterBPE(
        ids=vocab,
        merges=merges,
        bytes_of=bytes_of,
        unknown=None if name is None else vocab.get(name),
        fuse_unknown=bool(model.boolean("fuse_unk", False)),
        whole_words=bool(model.boolean("ignore_merges", False)),
    )


def _token_bytes(
    vocab: Mapping[str, int],
    added: Sequence[AddedToken],
    bytes_of: Mapping[int, int],
    is_byte_level: bool,
) -> list[bytes | None]:
    named = {token.id for token in added}
    found: list[bytes | None] = [None] * rows_of({*vocab.values(), *named})
    for text, id in vocab.items():
        if not is_byte_level:
            found[id] = _utf8(text.replace(BLANK, " "))
        elif id not in named:
            found[id] = to_bytes(text) if {*text} <= WRITTEN_BYTES else _utf8(text)
    for byte, id in bytes_of.items():
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


def _drops_blank(stages: Sequence[Fields]) -> bool:
    """Whether decoding drops a blank at the beginning; refuses decoders that do anything else."""
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    blank = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
    drops = False
    for stage in stages:
        kind = stage.text("type")
        if stage.values == strip:
            drops = True
        elif kind == "Metaspace":
            drops = stage.text("prepend_scheme", "always") != "never"
        elif stage.values != blank and kind not in ("ByteFallback", "Fuse"):
            stage.refuse("type", f"one of ByteFallback, Fuse, Metaspace, {strip}, {blank}")
    if not stages:
        raise TokenizerError(
            "tokenizer.json: decoder is missing: without one, words have no blanks"
        )
    return drops
