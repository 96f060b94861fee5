"""Tokens that are found in a text before anything else: added tokens and special tokens.

Special tokens (`<|eot_id|>`) are read from text only on request; other added tokens always.
Sources: the flags of AddedToken in tokenizers; llama.cpp, src/llama-vocab.cpp, end-of-generation
tokens (2026-11).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from glassllama.tokenizers.patterns import WHITESPACE_RANGES, word_points

WHITESPACE = "".join(chr(c) for first, last in WHITESPACE_RANGES for c in range(first, last + 1))
WHITESPACE_RUN = re.compile(f"[{WHITESPACE}]*")

# Tokens that end an answer by their name. Files often declare one end (of the text) and use two (of
# a turn as well). As in llama.cpp a token of such a name is special, whatever the file declares.
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
START_OF_TURN = "<start_of_turn>"  # the same in Gemma's files


def is_special(text: str) -> bool:
    """Whether an added token with this text is special, even if its file says otherwise."""
    is_named = text in END_OF_GENERATION or text == START_OF_TURN
    return is_named or LOOKS_SPECIAL.fullmatch(text) is not None


def stop_ids_by_name(ids: Mapping[str, int]) -> set[int]:
    """The ids of the tokens in `ids` (text → id) that end an answer by their name."""
    stops = {name: ids[name] for name in END_OF_GENERATION if name in ids}
    calls = {"<|call|>", "<|calls|>"} & stops.keys()
    if calls and {"<|return|>", "<|flush|>"} & stops.keys():
        stops.pop("<|end|>", None)  # in these vocabularies it ends a part of the answer
    if "<|tool_response>" in stops:
        stops.pop("</s>", None)
    return {*stops.values()}


def pattern_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the texts, the longest where several start; None for no texts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def find_tokens(text: str, tokens: Iterable[str]) -> list[str]:
    """Those of the tokens that occur in a text, in order of occurrence, each once."""
    pattern = pattern_of(tokens)
    return [] if pattern is None else list(dict.fromkeys(pattern.findall(text)))


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
        tokens.pop("", None)
        self._tokens = tokens
        self._pattern = pattern_of(tokens)
        self._only_special = all(token.is_special for token in tokens.values())

    def split(self, text: str, specials: bool) -> Iterator[str | int]:
        begin = 0
        skip = self._pattern is None or (self._only_special and not specials)
        for found in () if skip or self._pattern is None else self._pattern.finditer(text):
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
