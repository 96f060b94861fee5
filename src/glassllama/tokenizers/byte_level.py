"""GPT-2's way of writing bytes as text, used by tokenizer.json and GGUF vocabularies.

Every byte gets a visible character: printable Latin-1 stands for itself, the rest moves up to
U+0100 and on, so a blank is written Ġ and a line end Ċ. " low" is the token "Ġlow".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.bpe import Vocabulary
from glassllama.tokenizers.split import Split

PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # !…~ ¡…¬ ®…ÿ
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTER_TO_BYTE = {byte: byte for byte in PRINTABLE} | {
    0x100 + at: byte for at, byte in enumerate(OTHERS)
}
# For str.translate: a character of no byte becomes one that Latin-1 cannot write.
TO_LATIN1 = {char: char for char in range(256)} | {
    char: 0xFFFF for char in range(256) if char not in CHARACTER_TO_BYTE
}
TO_LATIN1 |= CHARACTER_TO_BYTE


def to_bytes(written: str) -> bytes:
    """The bytes that a written token stands for: "Ġlow" → b" low"."""
    try:
        return written.translate(TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError as fault:
        raise TokenizerError(
            f"vocabulary: token {written!r} holds {written[fault.start]!r}, which stands for no "
            "byte; this is not a byte-level vocabulary"
        ) from fault


def byte_level_vocabulary(
    *,
    size: int,
    written: Mapping[int, str],
    merges: Iterable[tuple[str, str]],
    texts: Mapping[int, str],
    controls: Mapping[str, int],
    added: Mapping[str, int],
    split: Split,
    whole_words: bool,
) -> Vocabulary:
    """A vocabulary from tokens `written` in GPT-2's characters, plain `texts`, and merges.

    Merges rank by their order. TokenizerError: a token given twice, a merge of unknown tokens.
    """
    tokens: list[bytes | None] = [None] * size
    bytes_of = {token: to_bytes(token) for token in written.values()}
    ids = {bytes_of[token]: id for id, token in written.items()}
    if len(ids) < len(written):
        raise TokenizerError(f"vocabulary: {len(written) - len(ids)} tokens are given twice")
    for id, token in written.items():
        tokens[id] = bytes_of[token]
    for id, text in texts.items():
        tokens[id] = text.encode()
    return Vocabulary(
        tokens=tuple(tokens),
        ids=ids,
        merges=ranked(merges, bytes_of, ids),
        split=split,
        whole_words=whole_words,
        controls=controls,
        added=added,
    )


def ranked(
    merges: Iterable[tuple[str, str]], bytes_of: Mapping[str, bytes], ids: Mapping[bytes, int]
) -> dict[tuple[bytes, bytes], int]:
    ranks: dict[tuple[bytes, bytes], int] = {}
    for rank, (left, right) in enumerate(merges):
        try:
            pair = bytes_of[left], bytes_of[right]
            ids[pair[0] + pair[1]]
        except KeyError:
            raise TokenizerError(
                f"merges: number {rank} joins {left!r} and {right!r}, but these two or their join "
                "are not in the vocabulary"
            ) from None
        ranks[pair] = rank
    return ranks
