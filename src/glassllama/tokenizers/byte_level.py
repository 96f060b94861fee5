"""GPT-2's way of writing bytes as text, used by tokenizer.json and GGUF vocabularies.

Every byte gets a visible character: printable Latin-1 stands for itself, the rest moves up to
U+0100 and on, so a blank is written Ġ and a line end Ċ. " low" is the token "Ġlow".
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from functools import cache

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.added import AddedToken
from glassllama.tokenizers.bpe import Vocabulary
from glassllama.tokenizers.ends import END_OF_ANSWER
from glassllama.tokenizers.pretokenizer import Split
from glassllama.tokenizers.rows import rows_of

PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # !…~ ¡…¬ ®…ÿ
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTER_TO_BYTE = {byte: byte for byte in PRINTABLE} | {
    0x100 + at: byte for at, byte in enumerate(OTHERS)
}
BYTE_TO_CHARACTER = {byte: chr(character) for character, byte in CHARACTER_TO_BYTE.items()}
WRITTEN_BYTES = {*BYTE_TO_CHARACTER.values()}
WRITTEN = re.compile(f"[{re.escape(''.join(sorted(WRITTEN_BYTES)))}]*")
NO_LATIN1 = 0xFFFF  # what a character that stands for no byte becomes, so that encoding fails
TO_LATIN1 = dict.fromkeys(OTHERS, NO_LATIN1) | CHARACTER_TO_BYTE  # for str.translate

# Files of fine-tuned models flag tokens such as <|im_end|> as plain additions. Were they read from
# any text, a user could end his message with them and speak as the system: they are controls.
LOOKS_LIKE_CONTROL = re.compile(r"<\|.+\|>")
START_OF_TURN = "<start_of_turn>"  # the same in Gemma's files


def to_bytes(written: str) -> bytes:
    """The bytes that a written token stands for: "Ġlow" → b" low"."""
    try:
        return written.translate(TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError as fault:
        raise TokenizerError(
            f"vocabulary: token {quoted(written)} holds {written[fault.start]!r}, which stands for "
            "no byte; this is not a byte-level vocabulary"
        ) from fault


def byte_level_vocabulary(
    *,
    written: Mapping[int, str],
    merges: Iterable[tuple[str, str]],
    controls: Mapping[str, int],
    added: Mapping[str, int],
    unused: Mapping[int, str],
    split: Split,
    whole_words: bool,
    flagged: Iterable[AddedToken] = (),
    in_words: Container[str] | None = None,
) -> Vocabulary:
    """A vocabulary from tokens `written` in GPT-2's characters and others in plain text.

    Merges rank by their order, and name tokens only. `in_words`: the added tokens that a word can
    become where they are not cut out of the text; None: all. TokenizerError: a token or id given
    twice, or out of all bounds.
    """
    texts = plain_texts(controls, added, unused)
    if both := texts.keys() & written.keys():
        raise TokenizerError(f"vocabulary: id {min(both)} is given to two tokens")
    # Merges may make an added token, too.
    words = [text for text in added if is_written(text) and (in_words is None or text in in_words)]
    written = {**written, **{added[text]: text for text in words}}
    bytes_of = {token: to_bytes(token) for token in written.values()}
    ids = {bytes_of[token]: id for id, token in written.items()}
    if b"" in ids or len(ids) < len(written):
        what = "a token is empty" if b"" in ids else "a token is given twice"
        raise TokenizerError(f"vocabulary: {what}; the file is damaged")
    look = {text: id for text, id in added.items() if is_control(text)}
    return Vocabulary(
        tokens=by_id({id: bytes_of[token] for id, token in written.items()} | texts),
        ids=ids,
        merges=ranked(merges, bytes_of),
        split=split,
        whole_words=whole_words,
        controls={**controls, **look},
        added={text: id for text, id in added.items() if text not in look},
        flagged=tuple(flagged),
    )


def is_control(text: str) -> bool:
    """Whether an added token of this text is a control token, even if its file says otherwise."""
    is_named = text in END_OF_ANSWER or text == START_OF_TURN
    return is_named or LOOKS_LIKE_CONTROL.fullmatch(text) is not None


def is_written(text: str) -> bool:
    return WRITTEN.fullmatch(text) is not None


def plain_texts(
    controls: Mapping[str, int], added: Mapping[str, int], unused: Mapping[int, str]
) -> dict[int, bytes]:
    """id → UTF-8 of tokens whose text stands for itself."""
    named = {id: text for kind in (controls, added) for text, id in kind.items()}
    if "" in named.values() or len(named) < len(controls) + len(added) or named.keys() & unused:
        raise TokenizerError("vocabulary: an added token is empty or shares its id with another")
    return {id: text.encode(errors="surrogatepass") for id, text in {**named, **unused}.items()}


def by_id(tokens: Mapping[int, bytes]) -> tuple[bytes | None, ...]:
    return tuple(map(tokens.get, range(rows_of(tokens))))


def ranked(
    merges: Iterable[tuple[str, str]], bytes_of: Mapping[str, bytes]
) -> dict[tuple[bytes, bytes], int]:
    """Pair → rank of merges in their order; of a pair that comes twice the last counts."""
    return {(bytes_of[left], bytes_of[right]): rank for rank, (left, right) in enumerate(merges)}


def with_merges(vocabulary: Vocabulary, merges: Iterable[str]) -> Vocabulary:
    """A GGUF's vocabulary with its merges, written "a b"; of a pair that comes twice the first.

    Merges may name, or make, what is no token: as in llama.cpp such parts fall into bytes in the
    end, and so do control tokens, which no text becomes. `outside` counts them. What is not written
    in GPT-2's letters can never be met.
    """
    ranks: dict[tuple[bytes, bytes], int] = {}
    outside = 0
    ids = vocabulary.ids
    bytes_of = cache(
        lambda part: to_bytes(part) if is_written(part) else b""
    )  # most parts occur often
    for rank, merge in enumerate(merges):
        cut = merge.find(" ", 1)  # a merge may begin with a blank
        left, right = (merge[:cut], merge[cut + 1 :]) if cut > 0 else ("", "")
        pair = bytes_of(left), bytes_of(right)
        if not (pair[0] and pair[1]):
            outside += 1
            continue
        outside += not (pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids)
        ranks.setdefault(pair, rank)
    return replace(vocabulary, merges=ranks, outside=outside)
