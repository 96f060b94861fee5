"""Any BPE pipeline of a tokenizer.json, run stage by stage as the file states it.

    text → added tokens → normalizer → pre_tokenizer → words → BPE → ids

Slower than bpe.py, which has compiled loops for a few patterns: this is plain Python. Blanks in
SentencePiece's vocabularies (Llama 2, Mistral, Gemma) are ▁, bytes in GPT-2's are letters; both
are only stages here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from glassllama.tokenizers.added import AddedTokens
from glassllama.tokenizers.bpe import surrogate_error
from glassllama.tokenizers.character_bpe import CharacterBPE
from glassllama.tokenizers.rows import Rows, gaps_in
from glassllama.tokenizers.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """`token_bytes` by id: None is an id without a token. `words` makes ids of one word.

    `plain_words` is the same without control tokens. `hides_controls`: decoding leaves them out,
    and with `drops_blank` the blank that a text begins with, as SentencePiece does.
    """

    added: AddedTokens
    split: Stage
    words: CharacterBPE
    plain_words: CharacterBPE
    token_bytes: Sequence[bytes | None] = field(repr=False)
    hides_controls: bool
    drops_blank: bool


class PipelineTokenizer(Rows):
    """Text ↔ ids by a `Pipeline`; a `base.interfaces.Tokenizer`.

    Odd input: a lone surrogate is a TokenizerError; bytes that are no UTF-8 decode to U+FFFD; a
    character that the vocabulary has no token for is what the file says: bytes, unknown or nothing.
    Without `specials` no control token is made of text, neither found nor merged.
    """

    def __init__(
        self, pipeline: Pipeline, *, bos: int | None, stop_ids: Iterable[int] = ()
    ) -> None:
        self.pipeline = pipeline
        self.bos = bos
        self.stop_ids = frozenset(stop_ids)
        self.notes: list[str] = []  # what was odd in the files
        controls = {t.text: t.id for t in pipeline.added.tokens if t.is_control}
        self.specials = MappingProxyType(controls)
        self._hidden = frozenset(controls.values()) if pipeline.hides_controls else frozenset()
        self.gaps = gaps_in(pipeline.token_bytes)
        for id in (*self.stop_ids, *([] if bos is None else [bos])):
            self.token_bytes(id)  # must exist

    @property
    def added(self) -> Mapping[str, int]:
        """Tokens that are read from any text, though they are no control tokens: text -> id."""
        return {t.text: t.id for t in self.pipeline.added.tokens if not t.is_control}

    def without_added(self, texts: Iterable[str]) -> PipelineTokenizer:
        """The same tokenizer, for which these added tokens are plain text."""
        left, old = {*texts}, self.pipeline
        unread = {self.added[text] for text in left}
        pipeline = replace(
            old,
            added=AddedTokens([t for t in old.added.tokens if t.text not in left],
                              old.added.normalize),
            words=old.words.without(unread),
            plain_words=old.plain_words.without(unread),
        )  # fmt: skip
        return PipelineTokenizer(pipeline, bos=self.bos, stop_ids=self.stop_ids)

    @property
    def vocab_size(self) -> int:
        return len(self.pipeline.token_bytes)

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """The ids of a text; with `specials`, control tokens written in it become their ids."""
        ids = [self.bos] if bos and self.bos is not None else []
        for some in self._id_lists(text, specials, at_start=True):
            ids += some
        return ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of texts and control ids in order, with a blank where this model puts one."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            for some in self._id_lists(part, False, at_start=not ids):
                ids += some
        return ids

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text without control tokens, (T,)."""
        return np.array(self.encode(text), dtype=np.uint32)

    def _id_lists(self, text: str, specials: bool, at_start: bool) -> Iterator[list[int]]:
        model = self.pipeline.words if specials else self.pipeline.plain_words
        try:
            for piece in self.pipeline.added.cut(text, specials=specials):
                if isinstance(piece, int):
                    yield [piece]
                else:
                    for word, _ in self.pipeline.split([(piece, at_start)]):
                        yield from model.id_lists(word)
                at_start = False
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; a character that is cut in two, or no UTF-8, becomes U+FFFD."""
        data = b"".join([self.token_bytes(id) for id in ids if id not in self._hidden])
        starts_blank = data.startswith(b" ") and self.pipeline.drops_blank
        return data[starts_blank:].decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one id; a control token's are its text."""
        tokens = self.pipeline.token_bytes
        token = tokens[id] if 0 <= id < len(tokens) else None
        return self.bytes_without_token(id, len(tokens)) if token is None else token
