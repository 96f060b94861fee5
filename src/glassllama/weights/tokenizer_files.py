"""The small files beside a tokenizer: tokens that were added to it, and their roles.

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
from glassllama.tokenizers.sentencepiece import Pieces, PieceType
from glassllama.tokenizers.vocabulary import FLAGS, LARGEST_VOCABULARY, is_special, read_json

SMALL_FILE = 2**24  # bytes; real ones have up to 200,000
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the newer name first
# Named tokens of every tokenizer, in the order in which transformers adds them; others follow.
STANDARD = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())
# A named token that is an ordinary token of the vocabulary becomes special if it looks like one.
# Others (a newline as eos) stay ordinary, because texts contain them.
IN_BRACKETS = re.compile(r"<.+>|\[.+\]", re.DOTALL)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class SideToken:
    """A token that a small file names. `source` is the file and key, for errors.

    A token without `id` that the vocabulary lacks gets the next id. For `is_end` (the ends of a
    text) that id stays unused: a model that was trained with them has them in its vocabulary.
    """

    content: str
    source: str
    id: int | None = None
    special: bool = True
    flags: Json | None = None  # None: not in any file
    is_end: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """The contents of all small files.

    `fields` of tokenizer_config.json and the others; `named`: the texts of bos_token, …
    """

    fields: Fields
    tokens: tuple[SideToken, ...]
    named: dict[str, str]


def read_settings(folder: Path) -> TokenizerSettings:
    """The small files of a folder. TokenizerError: names the file and key that is wrong."""
    config = _fields(folder / "tokenizer_config.json")
    decoder = config.object("added_tokens_decoder", None)
    old = _fields(folder / "special_tokens_map.json") if decoder is None else Fields("", {})
    for fields in (config, old) if decoder is None else ():
        list(_special_tokens(fields))  # errors name their own file
    named, more = _named_and_more(config.values, old.values)
    fields = Fields(config.source, named, TokenizerError)
    found = [(name, token) for name in named for token in _special_token(fields, name)]
    special = [token for _, token in found]
    special += _special_tokens(Fields(config.source, {EXTRA[0]: more}, TokenizerError))
    if decoder is None:
        tokens = _added_tokens(folder / "added_tokens.json", {token.content for token in special})
    else:
        tokens = _decoder_tokens(decoder)
    return TokenizerSettings(
        fields=Fields(config.source, {**config.values, **old.values}, TokenizerError),
        tokens=(*tokens, *special),
        named={name: token.content for name, token in found},
    )


def _named_and_more(config: Json, old: Json) -> tuple[dict[str, Any], Any]:
    """Named special tokens and the list of more, both in the order in which new ones get an id.

    `old` is special_tokens_map.json. The older name of the list counts where the newer is missing,
    or names its tokens in an object.
    """
    newer, older = EXTRA
    values, own = dict(config), dict[str, Any]()
    if not values.get(newer) and older in values:
        values[newer] = values.pop(older)
    for name in [name for name in values if _is_name(name, values) and name not in STANDARD]:
        if isinstance(values[name], str):
            own[name] = values.pop(name)
    for some in ({}, old):
        known, more = values.get(newer), some.get(newer)
        values |= some
        if isinstance(known, list) and isinstance(more, list):
            values[newer] = [*known, *(one for one in more if one not in known)]
        if isinstance(values.get(newer), Mapping):
            own |= values.pop(newer)
    names = [*STANDARD, *(name for name in values if name not in STANDARD)]
    named = {name: values[name] for name in names if _is_name(name, values)}
    return {**named, **own}, values[newer] if newer in values else values.get(older)


def _is_name(name: str, values: Json) -> bool:
    """Whether a key names a token; `add_bos_token` does not."""
    types = (str, Mapping)
    return (name in STANDARD and name in values and not isinstance(values[name], bool)) or (
        name.endswith("_token") and isinstance(values.get(name), types)
    )


def _decoder_tokens(decoder: Fields) -> Iterator[SideToken]:
    """`added_tokens_decoder`, in the order of ids."""
    for key in decoder.values:
        if not (key.isascii() and key.isdecimal() and len(key) < 9):
            raise TokenizerError(f"{decoder.source}: keys must be ids, got {quoted(key)}")
    for key in sorted(decoder.values, key=int):
        token = decoder.object(key)
        content, special = _filled(token, "content"), token.boolean("special", False)
        yield SideToken(content, decoder.source, int(key), special, _flags(token, not special))


def _added_tokens(path: Path, special: set[str]) -> Iterator[SideToken]:
    """`added_tokens.json`: text → id. `special`: those that another file declares special."""
    fields = _fields(path)
    ids = {
        text: fields.integer(text, minimum=0, maximum=LARGEST_VOCABULARY - 1)
        for text in fields.values
    }
    if "" in ids:
        raise TokenizerError(f"{path}: a token is empty")
    for text in sorted(ids, key=ids.__getitem__):
        yield SideToken(text, str(path), ids[text], text in special)


def _special_tokens(fields: Fields) -> Iterator[SideToken]:
    """Named tokens, then the list of more, or an object of more named ones."""
    for name in fields.values:
        if _is_name(name, fields.values):
            yield from _special_token(fields, name)
    for key in EXTRA:
        more = fields.values.get(key)
        if more is None:
            continue
        if not isinstance(more, Mapping):
            more = {str(n): one for n, one in enumerate(fields.items(key))}
        inner = Fields(f"{fields.source}: {key}", more, fields.error)
        for name in more:
            yield from _special_token(inner, name)


def _special_token(fields: Fields, name: str) -> Iterator[SideToken]:
    """A token that is written as text, or as an object with `content`; none for a boolean."""
    value = fields.values.get(name)
    if value is None or isinstance(value, bool):
        return
    inner = fields.object(name) if isinstance(value, Mapping) else None
    content = _filled(fields, name) if inner is None else _filled(inner, "content")
    flags = None if inner is None else _flags(inner, False)
    source, is_end = f"{fields.source}: {name}", name in ("bos_token", "eos_token")
    yield SideToken(content, source, flags=flags, is_end=is_end)


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
    entries, model = document.get("added_tokens") or [], document.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    is_valid = isinstance(entries, list) and all(
        isinstance(one, Mapping) and isinstance(one.get("content"), str) for one in entries
    )
    if not is_valid or not isinstance(vocab, Mapping):
        return dict(document)  # its reader raises the error
    added = {one.get("content"): dict(one) for one in entries}
    ids = _Ids({**vocab, **{content: one.get("id") for content, one in added.items()}})
    new = set[str]()  # named without an id: the last flags count
    for token in tokens:
        flags = token.flags or {name: not token.special and name == "normalized" for name in FLAGS}
        if (known := added.get(token.content)) is not None:
            if token.content in new or (token.id is not None and token.flags is not None):
                known |= {**flags, "special": token.special}
        elif token.is_end and token.content not in vocab:
            ids.of(token)  # reserves its id, because later tokens got theirs after it
        elif token.content not in vocab or _becomes_special(token):
            entry = {"id": ids.of(token), "content": token.content, "special": token.special}
            added[token.content] = {**entry, **flags}
            new |= {token.content} if token.id is None else set()
    return {**document, "added_tokens": [*added.values()]}


def with_side_pieces(pieces: Pieces, tokens: Iterable[SideToken]) -> Pieces:
    """A SentencePiece model with these tokens. TokenizerError: an id of another token."""
    ids = _Ids(pieces.of_type(*PieceType))
    texts, types = [*pieces.texts], [*pieces.types]
    for token in tokens:
        special = token.special or is_special(token.content)
        new_type = PieceType.CONTROL if special else PieceType.USER_DEFINED
        if any((token.flags or {}).get(name) for name in FLAGS[:3]):
            raise TokenizerError(
                f"{token.source}: {quoted(token.content)} has lstrip, rstrip or single_word, which "
                "is not supported beside a tokenizer.model; use the model's tokenizer.json"
            )
        is_known, id = token.content in ids, ids.of(token)
        if token.is_end and not is_known:
            continue  # its id stays unused
        missing = id + 1 - len(texts)
        is_new = missing > 0 or types[id] is PieceType.UNUSED
        texts += [""] * missing
        types += [PieceType.UNUSED] * missing
        is_ordinary = types[id] in (PieceType.NORMAL, PieceType.USER_DEFINED)
        if is_new or (is_ordinary and _becomes_special(token)):
            texts[id], types[id] = token.content, new_type
    scores = (*pieces.scores, *[0.0] * (len(texts) - len(pieces.texts)))
    return replace(pieces, texts=tuple(texts), types=tuple(types), scores=scores, added_first=True)


def _becomes_special(token: SideToken) -> bool:
    """Whether an ordinary token of the vocabulary becomes a special token."""
    return token.id is not None or IN_BRACKETS.fullmatch(token.content) is not None


class _Ids:
    """Ids of known and new tokens."""

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
                f"{token.source}: {quoted(token.content)} has the id {id}, which is that of "
                f"{quoted(self._texts[id])}; the files are of two tokenizers"
            )
        self._ids[token.content], self._texts[id] = id, token.content
        self._next = max(self._next, id + 1)
        return id


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; an empty one where there is no file."""
    return read_json(path, SMALL_FILE) if path.is_file() else {}


def _fields(path: Path) -> Fields:
    return Fields(str(path), optional_json(path), TokenizerError)
