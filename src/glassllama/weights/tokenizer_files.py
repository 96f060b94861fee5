"""The small files beside a tokenizer: which tokens were added to it, and what they are for.

    added_tokens_decoder  tokenizer_config.json's: id → token with its flags
    added_tokens.json, special_tokens_map.json   older files with the same; read where the first is
                                                 missing
    bos_token, …_token    named tokens, in tokenizer_config.json or special_tokens_map.json
    extra_special_tokens  more special tokens; additional_special_tokens is its older name

Precedence is that of transformers 5, PreTrainedTokenizerBase.from_pretrained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import Fields
from glassllama.tokenizers.byte_level import is_control
from glassllama.tokenizers.files import read_json
from glassllama.tokenizers.pieces import Kind, Pieces
from glassllama.tokenizers.rows import LARGEST_VOCABULARY

LARGEST_FILE = 1 << 24  # bytes; real ones have up to 200,000
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the newer name first
NAMED = re.compile(r"[a-z_]*_token")
# A named token that the vocabulary has as a piece is a control token if it looks like one. Others
# (a line end as eos) stay what they are, or no text could be written without them.
IN_BRACKETS = re.compile(r"<.+>|\[.+\]", re.DOTALL)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class SideToken:
    """A token that a small file names. `place` is the file and key, for errors.

    Without `id` a token that the vocabulary lacks gets the next one, but for the ends of a text: a
    model that was trained with them has them.
    """

    content: str
    place: str
    id: int | None = None
    special: bool = True
    flags: Json | None = None  # None: no file says
    is_end: bool = False


@dataclass(frozen=True)
class Settings:
    """What the small files say together: `values` are tokenizer_config.json's, with the others'."""

    path: Path  # of tokenizer_config.json, for errors
    values: Json
    tokens: tuple[SideToken, ...]

    @property
    def named(self) -> dict[str, str]:
        """The texts of named tokens: bos_token, eos_token, …"""
        fields = Fields(str(self.path), self.values, TokenizerError)
        texts = {name: _content(fields, name) for name in self.values if NAMED.fullmatch(name)}
        return {name: text for name, text in texts.items() if text is not None}


def read_settings(folder: Path) -> Settings:
    """The small files of a folder. TokenizerError: names the file and key that is wrong."""
    path = folder / "tokenizer_config.json"
    values: dict[str, Any] = dict(optional_json(path))
    tokens = list(_decoder_tokens(Fields(str(path), values, TokenizerError)))
    if values.get("added_tokens_decoder") is None:
        old_path = folder / "special_tokens_map.json"
        old = optional_json(old_path)
        for place, some in ((path, values), (old_path, old)):  # errors name their own file
            list(_special_tokens(Fields(str(place), some, TokenizerError)))
        extra = values.get(EXTRA[0]) or values.get(EXTRA[1])
        values |= old
        if isinstance(extra, list) and isinstance(old.get(EXTRA[0]), list):
            values[EXTRA[0]] = [*extra, *(one for one in old[EXTRA[0]] if one not in extra)]
    special = list(_special_tokens(Fields(str(path), values, TokenizerError)))
    if values.get("added_tokens_decoder") is None:
        tokens += _added_tokens(folder / "added_tokens.json", {token.content for token in special})
    return Settings(path, values, (*tokens, *special))


def _decoder_tokens(config: Fields) -> Iterator[SideToken]:
    """`added_tokens_decoder`, in the order of ids."""
    decoder = config.object("added_tokens_decoder", None)
    if decoder is None:
        return
    for key in decoder.values:
        if not (key.isascii() and key.isdecimal() and len(key) < 9):
            raise TokenizerError(f"{decoder.place}: keys must be ids, got {quoted(key)}")
    for key in sorted(decoder.values, key=int):
        token = decoder.object(key)
        content = _filled(token, "content")
        special = token.boolean("special", False)
        yield SideToken(content, decoder.place, int(key), special, _flags(token, not special))


def _added_tokens(path: Path, special: set[str]) -> list[SideToken]:
    """`added_tokens.json`: text → id. Special are those that another file calls so."""
    fields = Fields(str(path), optional_json(path), TokenizerError)
    ids = {text: fields.whole(text, least=0, most=LARGEST_VOCABULARY - 1) for text in fields.values}
    if "" in ids:
        raise TokenizerError(f"{path}: a token is empty")
    return [
        SideToken(text, str(path), id, text in special)
        for text, id in sorted(ids.items(), key=lambda item: item[1])
    ]


def _special_tokens(fields: Fields) -> Iterator[SideToken]:
    """Named tokens, then the list of more, or an object of more named ones."""
    for name in fields.values:
        if NAMED.fullmatch(name) and not isinstance(fields.values[name], bool):
            yield from _special_token(fields, name)
    for key in EXTRA:
        more = fields.values.get(key)
        if isinstance(more, Mapping):
            inner = fields.object(key)
            assert inner is not None
            for name in inner.values:
                yield from _special_token(inner, name)
        elif more is not None:
            items = enumerate(fields.items(key))
            inner = Fields(
                f"{fields.place}: {key}", {str(n): one for n, one in items}, fields.error
            )
            for name in inner.values:
                yield from _special_token(inner, name)
        if more:
            return  # the older name counts where the newer is missing


def _special_token(fields: Fields, name: str) -> Iterator[SideToken]:
    content = _content(fields, name)
    if content is not None:
        value = fields.values[name]
        flags = _flags(fields.object(name), False) if isinstance(value, Mapping) else None
        place, is_end = f"{fields.place}: {name}", name in ("bos_token", "eos_token")
        yield SideToken(content, place, flags=flags, is_end=is_end)


def _content(fields: Fields, name: str) -> str | None:
    """The text of a token that is written as text, or as an object with `content`."""
    value = fields.values.get(name)
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, Mapping):
        return _filled(fields.object(name), "content")
    return _filled(fields, name)


def _filled(fields: Fields, key: str) -> str:
    text = fields.text(key)
    if not text:
        fields.refuse(key, "a text that is not empty")
    return text


def _flags(token: Fields, normalized: bool) -> dict[str, bool]:
    return {name: token.boolean(name, normalized and name == "normalized") for name in FLAGS}


def with_side_tokens(document: Json, tokens: Iterable[SideToken]) -> dict[str, Any]:
    """A tokenizer.json with these tokens among its `added_tokens`.

    A token that the file has keeps its id. TokenizerError: an id of another token.
    """
    listed, model = document.get("added_tokens") or [], document.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    whole = isinstance(listed, list) and all(
        isinstance(one, Mapping) and isinstance(one.get("content"), str) for one in listed
    )
    if not whole or not isinstance(vocab, Mapping):
        return dict(document)  # its reader says what is wrong
    added = {one.get("content"): dict(one) for one in listed}
    ids = _Ids({**vocab, **{content: one.get("id") for content, one in added.items()}})
    for token in tokens:
        if (known := added.get(token.content)) is not None:
            if token.id is not None and token.flags is not None:
                known |= {**token.flags, "special": token.special}
        elif _becomes_control(token) if token.content in vocab else not token.is_end:
            flags = token.flags or {name: not token.special and name == FLAGS[3] for name in FLAGS}
            entry = {"id": ids.of(token), "content": token.content, "special": token.special}
            added[token.content] = {**entry, **flags}
    return {**document, "added_tokens": [*added.values()]}


def with_side_pieces(pieces: Pieces, tokens: Iterable[SideToken]) -> Pieces:
    """A SentencePiece model with these tokens. TokenizerError: an id of another token."""
    ids = _Ids(pieces.of_kind(*Kind))
    texts, kinds = [*pieces.texts], [*pieces.kinds]
    for token in tokens:
        wanted = Kind.CONTROL if token.special or is_control(token.content) else Kind.USER_DEFINED
        if any((token.flags or {}).get(name) for name in FLAGS[:3]):
            raise TokenizerError(
                f"{token.place}: {quoted(token.content)} has lstrip, rstrip or single_word, which "
                "is not supported beside a tokenizer.model; use the model's tokenizer.json"
            )
        is_new = token.content not in ids
        if is_new and token.is_end:
            continue
        id = ids.of(token)
        missing = id + 1 - len(texts)
        texts += [""] * missing
        kinds += [Kind.UNUSED] * missing
        if is_new or (kinds[id] in (Kind.NORMAL, Kind.USER_DEFINED) and _becomes_control(token)):
            texts[id], kinds[id] = token.content, wanted
    scores = (*pieces.scores, *[0.0] * (len(texts) - len(pieces.texts)))
    return replace(pieces, texts=tuple(texts), kinds=tuple(kinds), scores=scores, added_first=True)


def _becomes_control(token: SideToken) -> bool:
    """Whether a piece of the vocabulary is read as one token from now on."""
    return token.id is not None or IN_BRACKETS.fullmatch(token.content) is not None


class _Ids:
    """Ids of tokens, known and new ones."""

    def __init__(self, known: Json) -> None:
        self._ids = {text: id for text, id in known.items() if isinstance(id, int)}
        self._texts = {id: text for text, id in self._ids.items()}
        self._next = max(self._texts, default=-1) + 1

    def __contains__(self, text: str) -> bool:
        return text in self._ids

    def of(self, token: SideToken) -> int:
        """The id that the vocabulary has for a token, else the one a file gives, else the next."""
        if token.content in self._ids:
            return self._ids[token.content]
        id = self._next if token.id is None else token.id
        if id in self._texts:
            raise TokenizerError(
                f"{token.place}: {quoted(token.content)} has the id {id}, which is that of "
                f"{quoted(self._texts[id])}; the files are of two tokenizers"
            )
        self._ids[token.content], self._texts[id] = id, token.content
        self._next = max(self._next, id + 1)
        return id


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    check_size(path)
    return read_json(path)


def check_size(path: Path) -> None:
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise TokenizerError(
            f"{path}: {size} bytes, more than the {LARGEST_FILE} that such a file may have"
        )
