"""Special tokens, the vocabulary of a byte-level tokenizer, and what tokenizers of all kinds share.

Added tokens are found in a text before anything else. Of these the special ones (`<|eot_id|>`) are
read from text only on request. Sources: the flags of AddedToken in tokenizers; llama.cpp,
src/llama-vocab.cpp, end-of-generation tokens (2026-11).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.patterns import WHITESPACE_RANGES, word_points
from glassllama.tokenizers.pretokenizer import Split

WHITESPACE = "".join(chr(c) for first, last in WHITESPACE_RANGES for c in range(first, last + 1))
WHITESPACE_RUN = re.compile(f"[{WHITESPACE}]*")
ANYTHING = re.compile("(?s:.*)")
Trie = dict[str, "Trie"]  # the next character → the trie of what follows it
END = ""  # instead of a character: a text ends here

# Tokens whose name marks the end of an answer. Files often declare one end (of the text) and use
# two (of a turn as well). As in llama.cpp such a token is special, whatever the file declares.
END_OF_GENERATION = frozenset((
    # end of a turn or a text
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|endoftext|>",
    "</s>", "<eos>", "<end_of_turn>", "<turn|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~[",
    # a tool call, or what comes after an answer
    "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>",
    # fill in the middle: padding, the next file, the next repository
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
))  # fmt: skip
# Files of fine-tuned models declare tokens such as <|im_end|> as plain additions. If they were read
# from any text, a user could end a message with them and write as the system.
LOOKS_SPECIAL = re.compile(r"<\|.+\|>")


def is_special(text: str) -> bool:
    """Whether an added token with this text is special, even if its file says otherwise."""
    is_named = text in END_OF_GENERATION or text == "<start_of_turn>"  # the same in Gemma's files
    return is_named or LOOKS_SPECIAL.fullmatch(text) is not None


def stop_ids_by_name(ids: Mapping[str, int]) -> set[int]:
    """The ids of the tokens in `ids` (text → id) whose name marks the end of an answer."""
    stops = {name: ids[name] for name in END_OF_GENERATION if name in ids}
    calls = {"<|call|>", "<|calls|>"} & stops.keys()
    if calls and {"<|return|>", "<|flush|>"} & stops.keys():
        stops.pop("<|end|>", None)  # in these vocabularies it ends a part of the answer
    if "<|tool_response>" in stops:
        stops.pop("</s>", None)
    return {*stops.values()}


class TokenTrie:
    """Finds any of some texts in a text: the leftmost first, the longest where several start.

    A regular expression would try thousands of alternatives one by one at every `<`. Here they are
    a trie, nested tables by character, and one step down the trie excludes all texts that go on
    with another character. The methods are those of `re.Pattern`.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._root: Trie = {}
        for text in filter(None, texts):
            node = self._root
            for char in text:
                node = node.setdefault(char, {})
            node[END] = {}
        # Where a text may start, by its first two characters: found in compiled code.
        starts = (
            re.escape(char) + ("" if END in node else f"[{''.join(map(re.escape, node))}]")
            for char, node in self._root.items()
        )
        self._start = re.compile("|".join(starts) or "(?!)")

    def search(self, text: str, at: int = 0) -> re.Match[str] | None:
        """The first match that starts at this position or later."""
        while (start := self._start.search(text, at)) is not None:
            at = start.start()
            if (end := self._end(text, at)) > at:
                return ANYTHING.fullmatch(text, at, end)
            at += 1
        return None

    def _end(self, text: str, at: int) -> int:
        """The end of the longest of the texts that start here; `at` if none does."""
        node, end = self._root, at
        for position in range(at, len(text)):
            below = node.get(str.__getitem__(text, position))  # also of subclasses of str
            if below is None:
                break
            node = below
            end = position + 1 if END in node else end
        return end

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        """The matches, which do not overlap."""
        at = 0
        while (found := self.search(text, at)) is not None:
            yield found
            at = found.end()

    def split(self, text: str) -> list[str]:
        """The text in parts: text, match, text, …, match, text."""
        parts, at = list[str](), 0
        for found in self.finditer(text):
            parts += [text[at : found.start()], found[0]]
            at = found.end()
        return [*parts, text[at:]]


def pattern_of(texts: Iterable[str]) -> TokenTrie:
    """Finds any of the texts, the longest where several start."""
    return TokenTrie(texts)


def find_tokens(text: str, tokens: Iterable[str]) -> list[str]:
    """Those of the tokens that occur in a text, in order of occurrence, each once."""
    return [*dict.fromkeys(found[0] for found in TokenTrie(tokens).finditer(text))]


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token, besides `special`


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is found by its text. `is_special`: read from text only on request.

    `lstrip`, `rstrip`: it includes the whitespace before or after it. `single_word`: it is not
    found next to a letter, digit or the like. `normalized`: it is found in the normalized text.
    """

    id: int
    text: str
    is_special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class AddedTokens:
    """Splits a text at added tokens: at those of the original text first, then the normalized."""

    def __init__(
        self, tokens: Iterable[AddedToken], normalize: Callable[[str], str] | None = None
    ) -> None:
        self.tokens = tuple(tokens)
        self.normalize = normalize
        raw = [token for token in self.tokens if not token.normalized]
        normalized = [token for token in self.tokens if token.normalized]
        self._raw = _Finder({token.text: token for token in reversed(raw)})
        # tokenizers searches special tokens first: of two with equal texts it finds the special.
        normalized.sort(key=lambda token: not token.is_special)
        form = normalize or str
        self._normalized = _Finder({form(token.text): token for token in reversed(normalized)})

    def split(self, text: str, *, specials: bool) -> Iterator[str | int]:
        """The parts of a text in order: normalized text, never empty, and ids of added tokens."""
        for part in self._raw.split(text, specials):
            if isinstance(part, int):
                yield part
            else:
                normalized = part if self.normalize is None else self.normalize(part)
                yield from self._normalized.split(normalized, specials)


class _Finder:
    """Finds tokens by their text: the leftmost first, the longest of those."""

    def __init__(self, tokens: dict[str, AddedToken]) -> None:
        self._tokens = tokens
        self._trie = TokenTrie(tokens)
        self._only_special = all(token.is_special for token in tokens.values())

    def split(self, text: str, specials: bool) -> Iterator[str | int]:
        begin = 0
        skip = self._only_special and not specials
        for found in () if skip else self._trie.finditer(text):
            token = self._tokens[found[0]]
            start, stop = found.span()
            if token.is_special and not specials:
                continue
            if token.single_word and (
                is_word(text[start - 1 : start]) or is_word(text[stop : stop + 1])
            ):
                continue
            if token.lstrip:
                start = begin + len(text[begin:start].rstrip(WHITESPACE))
            if token.rstrip:
                stop = next(WHITESPACE_RUN.finditer(text, stop)).end()
            if begin < start:
                yield text[begin:start]
            if start < stop:  # else the token before took all of it as whitespace
                yield token.id
            begin = stop
        if begin < len(text):
            yield text[begin:] if begin else text


def is_word(character: str) -> bool:
    """Whether a character is a letter, digit, mark or connector; False for the empty text."""
    return character != "" and bool(word_points()[ord(character)])


# The 256 bytes in GPT-2's order: the printable ones first. Their ids in learned vocabularies.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # !…~ ¡…¬ ®…ÿ
NOT_PRINTABLE = tuple(byte for byte in range(256) if byte not in PRINTABLE)
BYTE_TOKENS = tuple(bytes([value]) for value in (*PRINTABLE, *NOT_PRINTABLE))
BYTES = tuple(bytes([value]) for value in range(256))
NEVER = 2**31 - 1  # the rank of a pair that does not merge

PairRow = tuple[int, int, int, int]  # left id, right id, rank, id of the merged token


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The contents of a file of a byte-level BPE tokenizer.

    `tokens`: the bytes of each id; None: an id without a token. Special tokens are their text.
    `ids`: bytes → id of the tokens that merging can produce; no special token is among them.
    `merges`: pair → rank. None: the rank of a pair is the id of the merged token, as in tiktoken.
    `ignore_merges`: a pretoken that is a token is not merged, but taken as it is.
    `added_tokens`: found by their text before anything else; the special ones only on request.
    `text_chunks`: splits a long text before anything else.
    `num_unknown_merges`: merges that name or make something that is not a token.
    `non_token_ids`: their parts that are not tokens → ids after all others; split into bytes at
    the end.
    """

    tokens: tuple[bytes | None, ...]
    ids: Mapping[bytes, int] = field(repr=False)
    merges: Mapping[tuple[bytes, bytes], int] | None = field(repr=False)
    split: Split
    ignore_merges: bool
    added_tokens: tuple[AddedToken, ...] = field(repr=False)
    text_chunks: Callable[[str], Iterable[str]] | None = None
    num_unknown_merges: int = 0
    non_token_ids: Mapping[bytes, int] = field(default_factory=dict, repr=False)

    def added(self, *, is_special: bool) -> dict[str, int]:
        """Text → id of the added tokens, either the special ones or the others."""
        return {t.text: t.id for t in self.added_tokens if t.is_special == is_special}

    def token_splitter(self) -> AddedTokens:
        """Splits texts at the added tokens."""
        normalizes = self.split.normalize_nfc and any(t.normalized for t in self.added_tokens)
        return AddedTokens(self.added_tokens, partial(normalize, "NFC") if normalizes else None)

    def rank(self, left: bytes, right: bytes) -> int:
        """The rank of a pair, or NEVER."""
        if self.merges is None:
            return self.ids.get(left + right, NEVER)
        return self.merges.get((left, right), NEVER)

    def ids_of_part(self, part: bytes) -> list[int]:
        """The id of a merged part, or the ids of its bytes if it is not a token."""
        if part in self.ids:
            return [self.ids[part]]
        return [self.ids[byte] for byte in map(BYTES.__getitem__, part) if byte in self.ids]

    def pair_rows(self) -> Iterator[PairRow]:
        """Every pair that merges: of the list of merges, or all ways to split a token in two."""
        ids = {**self.ids, **self.non_token_ids}
        if self.merges is not None:
            for (left, right), rank in self.merges.items():
                yield ids[left], ids[right], rank, ids[left + right]
            return
        for token, id in ids.items():
            for cut in range(1, len(token)):
                first, second = ids.get(token[:cut]), ids.get(token[cut:])
                if first is not None and second is not None:
                    yield first, second, id, id


class TokenizerBase:
    """What tokenizers of all kinds share: the bytes of each id.

    A model may have more rows of embeddings (`model_rows`; 0: no model) than its tokenizer has
    tokens: nanoGPT has 50,304 rows for the 50,257 tokens of GPT-2. `gaps` are ids below
    `vocab_size` without a token.
    """

    model_rows = 0
    specials: Mapping[str, int]

    def __init__(
        self, tokens: Sequence[bytes | None], *, bos: int | None, stop_ids: Iterable[int]
    ) -> None:
        self._tokens = tokens
        self.bos = bos
        self.stop_ids = frozenset(stop_ids)
        self.gaps: Sequence[int] = [id for id, token in enumerate(tokens) if token is None]
        self.notes: list[str] = []  # unusual contents of the files
        for id in (*self.stop_ids, *([] if bos is None else [bos])):
            self.token_bytes(id)  # must exist

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """The ids of a text; with `specials`, special tokens written in it become their ids."""
        ids = [self.bos] if bos and self.bos is not None else []
        self._extend(ids, text, specials, at_start=True)
        return ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of texts and special ids in order; no text becomes a special id."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                self._extend(ids, part, specials=False, at_start=not ids)
        return ids

    def _extend(self, ids: list[int], text: str, specials: bool, at_start: bool) -> None:
        """Append the ids of a text. TokenizerError: it contains a lone surrogate."""
        try:
            for some in self._id_lists(text, specials, at_start):
                ids += some
        except UnicodeEncodeError as fault:
            raise surrogate_error(text) from fault

    def _id_lists(self, text: str, specials: bool, at_start: bool) -> Iterator[list[int]]:
        """The ids of a text, some at a time. `at_start`: no token comes before it."""
        raise NotImplementedError

    @property
    def added(self) -> Mapping[str, int]:
        """Added tokens that are not special: text → id."""
        return {}

    def without_added(self, texts: Iterable[str]) -> Tokenizer:
        """The same tokenizer, for which these added tokens are ordinary text."""
        return self

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text without special tokens, (T,)."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; a character that is cut in two, or not UTF-8, becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one id; of a special token its text. No bytes for a row of the model only.

        TokenizerError: the vocabulary and the model do not have the id.
        """
        token = self._tokens[id] if 0 <= id < len(self._tokens) else None
        if token is not None:
            return token
        if 0 <= id < self.model_rows:
            return b""
        last = max(len(self._tokens), self.model_rows) - 1
        raise TokenizerError(f"id {id}: not in the vocabulary, which has 0 … {last}")


def prompt_ids(tokenizer: Tokenizer, text: str, specials: bool) -> list[int]:
    """The ids of a prompt with the begin-of-text token once, even if the text starts with it."""
    ids = tokenizer.encode(text, bos=True, specials=specials)
    doubled = specials and ids[:2] == [tokenizer.bos] * 2
    return ids[1:] if doubled else ids


def surrogate_error(text: str) -> TokenizerError:
    """The error for a text that contains a lone surrogate."""
    at = next(at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return TokenizerError(
        f"text: character {at} is U+{ord(text[at]):04X}, half of a UTF-16 pair and no character; "
        "read the text as UTF-8"
    )


# Files

# Bytes. The largest published files have some 35 MB; parsed, JSON takes about eight times its size.
LARGEST_FILE = 2**28
LARGEST_VOCABULARY = 2**22  # sixteen times Gemma's; a file with a larger id is damaged
MAX_GAPS = 2**17  # ids without a token; a file that claims more of them is damaged, too


def read_json(path: Path, most: int = LARGEST_FILE) -> dict[str, Any]:
    """The object of a JSON file. TokenizerError: not JSON, not an object, or too large."""
    raw = read_bounded(path, most)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as fault:
        what = quoted(str(fault))
        raise TokenizerError(f"{path}: is no JSON ({what}); download it again") from fault
    if not isinstance(document, dict):
        raise TokenizerError(f"{path}: must hold a JSON object, got {type(document).__name__}")
    return document


def read_bounded(path: Path, most: int = LARGEST_FILE) -> bytes:
    """The bytes of a file. TokenizerError: not a regular file, or larger than `most` bytes."""
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise TokenizerError(f"{path}: is not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(min(size, most) + 1)  # allocates no more than the file has
    if len(raw) > most:
        raise TokenizerError(f"{path}: has more than {most:,} bytes, which no such file has")
    return raw


def size_of_vocabulary(ids: Collection[int]) -> int:
    """The largest id + 1. TokenizerError: a negative id, or far more ids than tokens."""
    size, most = max(ids, default=-1) + 1, min(LARGEST_VOCABULARY, len(ids) + MAX_GAPS)
    if min(ids, default=0) < 0 or size > most:
        raise TokenizerError(
            f"vocabulary: ids run from {min(ids)} to {size - 1}; expected 0 to at most {most - 1} "
            f"for {len(ids)} tokens"
        )
    return size


def tokenizer_json(specials: Mapping[str, int], **stages: Any) -> dict[str, Any]:
    """The object of a tokenizer.json with these special tokens (text → id) and stages."""
    flags = dict.fromkeys(FLAGS, False)
    added = [{"id": id, "content": text, **flags, "special": True} for text, id in specials.items()]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **stages}


def split_stage(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer of tokenizer.json that isolates the matches of a pattern."""
    behavior = {"behavior": "Isolated", "invert": False}
    return {"type": "Split", "pattern": {"Regex": pattern}, **behavior}
