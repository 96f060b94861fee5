"""Streaming: ids → text while they are generated, and stop strings that are never shown."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from glassllama.base.errors import GenerationError, quoted
from glassllama.base.interfaces import Tokenizer

MAX_STOP_CHARACTERS = 2**16  # of all stop strings: each is a state of the automaton


class Detokenizer:
    """Ids → text, one id at a time; bytes of an incomplete character are held back.

    The texts that `push` and `finish` return join to `tokenizer.decode(ids)` without special tokens
    (`tokenizer.specials`), which are not shown, except those in `shown`. TokenizerError: an id
    outside the vocabulary.

    `continues`: the ids continue a text, as in raw generation. Then SentencePiece's space before
    the first word is part of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, continues: bool = False, shown: Collection[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._special = {id for text, id in tokenizer.specials.items() if text not in shown}
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first_ids: list[int] = []  # ids while there is no text yet
        self._has_text = continues

    def push(self, id: int) -> str:
        """The text that is complete with this token; often its own, sometimes none yet."""
        data = self._tokenizer.token_bytes(id)
        if id in self._special or not data:
            return ""
        if not self._has_text:
            data = self._without_prefix_space(id, data)
            self._has_text = bool(data)
        return self._bytes_to_text.decode(data)

    def finish(self) -> str:
        """The rest of the text: bytes of an incomplete character, as U+FFFD."""
        return self._bytes_to_text.decode(b"", final=True)

    def _without_prefix_space(self, id: int, data: bytes) -> bytes:
        """SentencePiece puts a space before a text: `decode` decides whether to drop it."""
        if not data.startswith(b" "):
            return data
        # One id without text before this one stands for any number of them.
        self._first_ids = [*self._first_ids[:1], id]
        text = self._tokenizer.decode(self._first_ids)
        return data if text == data.decode("utf-8", "replace") else text.encode()


@dataclass(slots=True, eq=False)
class _State:
    """A state of the Aho-Corasick automaton: the start of some stop strings has been read."""

    depth: int = 0  # number of characters of that start
    following: dict[str, _State] = field(default_factory=dict)
    fallback: _State | None = None  # the longest proper suffix that also starts a stop string
    stop: str | None = None  # the longest stop string that ends here


class StopStrings:
    """Text → the part of it that may be shown: nothing of a stop string is.

    The stop string that *ends* first matches; of several that end at the same character, the
    longest. Text that may be the start of a stop string is held back until it is decided. The time
    is linear in the text, and the result does not depend on how the text is divided into calls.

    Source: Aho and Corasick, Efficient string matching (1975).
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.matched: str | None = None
        self._state = self._start = _automaton(strings)
        self._pending: deque[str] = deque()  # single characters: cheap to take from the left

    def push(self, text: str) -> str:
        """The text that may be shown now; after a match always empty."""
        if self.matched is not None:
            return ""
        for character in text:
            self._pending.append(character)
            self._state = _advance(self._state, character)
            if self._state.stop is not None:
                self.matched = self._state.stop
                return self._release(keep=len(self.matched))
        return self._release(keep=self._state.depth)

    def finish(self) -> str:
        """The text that was held back; empty after a match."""
        if self.matched is not None:
            return ""
        self._state = self._start
        return self._release(keep=0)

    def _release(self, keep: int) -> str:
        return "".join(self._pending.popleft() for _ in range(len(self._pending) - keep))


def _automaton(strings: Iterable[str]) -> _State:
    if isinstance(strings, str):
        raise GenerationError(
            f"stop: expected a list of strings, got the one string {quoted(strings)}"
        )
    start, total = _State(), 0
    for string in strings:
        if not isinstance(string, str) or not string:
            raise GenerationError(
                f"stop: expected strings that are not empty, got {quoted(string)}"
            )
        total += len(string)
        if total > MAX_STOP_CHARACTERS:
            raise GenerationError(
                f"stop: expected at most {MAX_STOP_CHARACTERS:,} characters in all strings "
                f"together, got more, the last one {quoted(string)}"
            )
        state = start
        for character in string:
            state = state.following.setdefault(character, _State(depth=state.depth + 1))
        state.stop = string
    queue = deque([start])  # set the fallback of every state, in order of depth
    while queue:
        state = queue.popleft()
        for character, after in state.following.items():
            after.fallback = _advance(state.fallback, character) if state.fallback else start
            after.stop = after.stop or after.fallback.stop
            queue.append(after)
    return start


def _advance(state: _State, character: str) -> _State:
    """The state after one more character: fall back until a stop string continues with it."""
    while character not in state.following and state.fallback is not None:
        state = state.fallback
    return state.following.get(character, state)
