"""GPT-2's way to write bytes as text, used by vocabularies in tokenizer.json and GGUF.

Every byte is one visible character: printable Latin-1 is itself, the others are U+0100 and
following, so that a space is written Ġ and a newline Ċ. The token " low" is written "Ġlow".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import replace
from functools import cache

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.backend import NOT_PRINTABLE, PRINTABLE
from glassllama.tokenizers.files import size_of_vocabulary
from glassllama.tokenizers.pretokenizer import Split
from glassllama.tokenizers.special_tokens import AddedToken
from glassllama.tokenizers.vocabulary import Vocabulary

CHARACTER_TO_BYTE = {byte: byte for byte in PRINTABLE} | {
    0x100 + at: byte for at, byte in enumerate(NOT_PRINTABLE)
}
BYTE_TO_CHARACTER = {byte: chr(character) for character, byte in CHARACTER_TO_BYTE.items()}
BYTE_CHARACTERS = {*BYTE_TO_CHARACTER.values()}
BYTE_LEVEL_TEXT = re.compile(f"[{re.escape(''.join(sorted(BYTE_CHARACTERS)))}]*")
NOT_LATIN1 = 0xFFFF  # for characters that stand for no byte, so that encoding fails
TO_LATIN1 = dict.fromkeys(NOT_PRINTABLE, NOT_LATIN1) | CHARACTER_TO_BYTE  # for str.translate


def to_bytes(text: str) -> bytes:
    """The bytes of a token in GPT-2's characters: "Ġlow" → b" low". TokenizerError: others."""
    try:
        return text.translate(TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError as fault:
        raise TokenizerError(
            f"vocabulary: token {quoted(text)} holds {text[fault.start]!r}, which stands for "
            "no byte; this is not a byte-level vocabulary"
        ) from fault


def byte_level_vocabulary(
    *,
    tokens: Mapping[int, str],
    merges: Iterable[tuple[str, str]],
    added_tokens: Collection[AddedToken],
    unused: Mapping[int, str],
    split: Split,
    ignore_merges: bool,
    mergeable: Container[str] | None = None,
) -> Vocabulary:
    """A vocabulary from `tokens` in GPT-2's characters, and added and `unused` ones in plain text.

    The rank of a merge is its index (of equal pairs the last); merges name tokens only.
    `mergeable`: the added tokens that merges may make in other text; None: all.
    TokenizerError: two tokens have the same text or id, or an id is far too large.
    """
    texts = {token.id: token.text for token in added_tokens}
    if "" in texts.values() or len(texts) < len(added_tokens) or texts.keys() & unused:
        raise TokenizerError("vocabulary: an added token is empty or shares its id with another")
    texts |= unused
    if both := texts.keys() & tokens.keys():
        raise TokenizerError(f"vocabulary: id {min(both)} is given to two tokens")
    made = {
        token.id: token.text
        for token in added_tokens
        if not token.is_special
        and is_byte_level(token.text)
        and (mergeable is None or token.text in mergeable)
    }
    tokens = {**tokens, **made}
    bytes_of = {token: to_bytes(token) for token in tokens.values()}
    ids = {bytes_of[token]: id for id, token in tokens.items()}
    if b"" in ids or len(ids) < len(tokens):
        what = "a token is empty" if b"" in ids else "a token is given twice"
        raise TokenizerError(f"vocabulary: {what}; the file is damaged")
    by_id = {id: bytes_of[token] for id, token in tokens.items()}
    by_id |= {id: text.encode(errors="surrogatepass") for id, text in texts.items()}
    return Vocabulary(
        tokens=tuple(map(by_id.get, range(size_of_vocabulary(by_id)))),
        ids=ids,
        merges={(bytes_of[a], bytes_of[b]): rank for rank, (a, b) in enumerate(merges)},
        split=split,
        ignore_merges=ignore_merges,
        added_tokens=tuple(added_tokens),
    )


def is_byte_level(text: str) -> bool:
    """Whether all characters of a text stand for bytes."""
    return BYTE_LEVEL_TEXT.fullmatch(text) is not None


def with_merges(vocabulary: Vocabulary, merges: Iterable[str]) -> Vocabulary:
    """A GGUF vocabulary with its merges "a b"; of equal pairs the first counts.

    Merges may name or make what is not a token, or a special token, which no text becomes. As in
    llama.cpp such parts are split into bytes in the end; `num_unknown_merges` counts them.
    Merges that are not in GPT-2's characters have no effect.
    """
    ranks: dict[tuple[bytes, bytes], int] = {}
    num_unknown = 0
    ids = vocabulary.ids
    bytes_of = cache(lambda part: to_bytes(part) if is_byte_level(part) else b"")
    for rank, merge in enumerate(merges):
        cut = merge.find(" ", 1)  # a merge may start with a space
        left, right = (merge[:cut], merge[cut + 1 :]) if cut > 0 else ("", "")
        pair = bytes_of(left), bytes_of(right)
        if not (pair[0] and pair[1]):
            num_unknown += 1
            continue
        num_unknown += not (pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids)
        ranks.setdefault(pair, rank)
    return replace(vocabulary, merges=ranks, num_unknown_merges=num_unknown)
