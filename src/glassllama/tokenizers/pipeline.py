"""Any BPE pipeline of a tokenizer.json, run stage by stage as the file describes it.

    text → added tokens → normalizer → pre_tokenizer → pretokens → BPE → ids

Slower than bpe.py, whose backend compiles a few patterns. SentencePiece vocabularies (Llama 2,
Mistral, Gemma) write spaces as ▁, byte-level ones write bytes in GPT-2's characters; both are only
stages here. Source: the model BPE of tokenizers; tests compare the ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from glassllama.tokenizers.backend import PYTHON, BPEBackend, Merger
from glassllama.tokenizers.pipeline_stages import PreTokenizer
from glassllama.tokenizers.sentencepiece import LONG, SHORT, SegmentEncoder
from glassllama.tokenizers.special_tokens import AddedTokens
from glassllama.tokenizers.vocabulary import NEVER, TokenizerBase, surrogate_error

Merges = Mapping[tuple[int, int], tuple[int, int]]  # pair of ids → rank, id of the merged token
NO_MERGE = (NEVER, 0)


@dataclass(frozen=True, kw_only=True)
class CharacterBPE:
    """BPE on the characters of a pretoken: one pretoken → ids.

    `ids`: the tokens that text may become. `byte_ids`: byte → id, of the bytes that have a token.
    A character without a token becomes the tokens of its bytes, or else `unknown`; None drops it.
    `fuse_unknown`: consecutive unknown characters are one. `ignore_merges`: a pretoken that is a
    token is not merged, but taken as it is.
    """

    ids: Mapping[str, int] = field(repr=False)
    merges: Merges = field(repr=False)
    byte_ids: Mapping[int, int] = field(repr=False)
    unknown: int | None
    fuse_unknown: bool
    ignore_merges: bool
    backend: BPEBackend = field(default=PYTHON, repr=False)

    def without(self, removed: Collection[int]) -> CharacterBPE:
        """The same where no text becomes one of these ids."""
        merges = {pair: made for pair, made in self.merges.items() if made[1] not in removed}
        ids = {text: id for text, id in self.ids.items() if id not in removed}
        return replace(self, ids=ids, merges=merges)

    def id_lists(self, word: str) -> Iterator[list[int]]:
        """The ids of a pretoken, some at a time."""
        if self.ignore_merges and word in self.ids:
            return iter(([self.ids[word]],))
        if len(word) <= SHORT or not self._can_cut:
            lists: Iterator[list[int]] = iter((self._segments.encode_segment(word),))
        else:
            lists = self._segments.id_lists(word)
        return self._fused(lists) if self.fuse_unknown else lists

    def _fused(self, lists: Iterator[list[int]]) -> Iterator[list[int]]:
        """One unknown for consecutive ones, also across segments."""
        last = None
        for ids in lists:
            if ids[:1] == [self.unknown] == [last]:
                ids = ids[1:]
            if ids:
                last = ids[-1]
                yield ids

    @cached_property
    def _can_cut(self) -> bool:
        """Whether all merged tokens are the text that they stand for."""
        other = {*self.byte_ids.values(), self.unknown}
        return not any(left in other or right in other for left, right in self.merges)

    @cached_property
    def _segments(self) -> SegmentEncoder:
        texts = {id: text for text, id in self.ids.items()}
        merged = [texts[id] for _, id in self.merges.values() if id in texts]
        return SegmentEncoder(merged, lambda segment: self._merged(self._symbols(segment)))

    def _symbols(self, word: str) -> list[int]:
        symbols: list[int] = []
        pending: list[int] = []  # unknowns come after bytes that follow them, as in tokenizers
        for char in word:
            if (id := self.ids.get(char)) is not None:
                symbols += [*pending, id]
                pending = []
                continue
            in_bytes = [self.byte_ids.get(byte) for byte in char.encode()] if self.byte_ids else []
            if in_bytes and None not in in_bytes:
                symbols += [id for id in in_bytes if id is not None]
            elif self.unknown is not None and not (self.fuse_unknown and pending):
                symbols += pending
                pending = [self.unknown]
        return symbols + pending

    def _merged(self, symbols: list[int]) -> list[int]:
        """The rule of `bpe.merge` on ids."""
        if len(symbols) > LONG:
            merged: list[int] = self._merger(np.array(symbols, np.int32)).tolist()
            return merged
        found = [self.merges.get(pair, NO_MERGE) for pair in pairwise(symbols)]
        while found and (lowest := min(found)) != NO_MERGE:
            at = found.index(lowest)
            symbols[at : at + 2] = [lowest[1]]
            del found[at]
            for begin in (at - 1, at):
                if 0 <= begin < len(found):
                    pair = symbols[begin], symbols[begin + 1]
                    found[begin] = self.merges.get(pair, NO_MERGE)
        return symbols

    @cached_property
    def _merger(self) -> Merger:
        return self.backend.merger((*pair, *made) for pair, made in self.merges.items())


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """`bpe` makes ids of a pretoken; `bpe_without_specials` makes no special tokens.

    `token_bytes` by id; None: an id without a token. `hides_specials`: decoding leaves out special
    tokens, and with `drops_prefix` the space that a text starts with, as in SentencePiece.
    """

    added: AddedTokens
    pre_tokenizer: PreTokenizer
    bpe: CharacterBPE
    bpe_without_specials: CharacterBPE
    token_bytes: Sequence[bytes | None] = field(repr=False)
    hides_specials: bool
    drops_prefix: bool


class PipelineTokenizer(TokenizerBase):
    """Text ↔ ids by a `Pipeline`; a `base.interfaces.Tokenizer`.

    A lone surrogate is a TokenizerError. Bytes that are not UTF-8 decode to U+FFFD. A character
    without a token becomes what the file says: bytes, unknown or nothing. Without `specials` no
    special token is made of text, neither found nor merged.
    """

    def __init__(
        self, pipeline: Pipeline, *, bos: int | None, stop_ids: Iterable[int] = ()
    ) -> None:
        super().__init__(pipeline.token_bytes, bos=bos, stop_ids=stop_ids)
        self.pipeline = pipeline
        specials = {t.text: t.id for t in pipeline.added.tokens if t.is_special}
        self.specials = MappingProxyType(specials)
        self._hidden = frozenset(specials.values()) if pipeline.hides_specials else frozenset()

    @property
    def added(self) -> Mapping[str, int]:
        """Added tokens that are not special: text → id."""
        return {t.text: t.id for t in self.pipeline.added.tokens if not t.is_special}

    def without_added(self, texts: Iterable[str]) -> PipelineTokenizer:
        """The same tokenizer, for which these added tokens are ordinary text."""
        removed, old = {*texts}, self.pipeline
        ids = {self.added[text] for text in removed}
        tokens = [token for token in old.added.tokens if token.text not in removed]
        pipeline = replace(
            old,
            added=AddedTokens(tokens, old.added.normalize),
            bpe=old.bpe.without(ids),
            bpe_without_specials=old.bpe_without_specials.without(ids),
        )
        return PipelineTokenizer(pipeline, bos=self.bos, stop_ids=self.stop_ids)

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """The ids of a text; with `specials`, special tokens written in it become their ids."""
        ids = [self.bos] if bos and self.bos is not None else []
        for some in self._id_lists(text, specials, at_start=True):
            ids += some
        return ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of texts and special ids in order, with a space where the model puts one."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            for some in self._id_lists(part, False, at_start=not ids):
                ids += some
        return ids

    def _id_lists(self, text: str, specials: bool, at_start: bool) -> Iterator[list[int]]:
        bpe = self.pipeline.bpe if specials else self.pipeline.bpe_without_specials
        try:
            for part in self.pipeline.added.split(text, specials=specials):
                if isinstance(part, int):
                    yield [part]
                else:
                    for word, _ in self.pipeline.pre_tokenizer([(part, at_start)]):
                        yield from bpe.id_lists(word)
                at_start = False
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; a character that is cut in two, or not UTF-8, becomes U+FFFD."""
        data = b"".join([self.token_bytes(id) for id in ids if id not in self._hidden])
        has_prefix = data.startswith(b" ") and self.pipeline.drops_prefix
        return data[has_prefix:].decode("utf-8", "replace")
