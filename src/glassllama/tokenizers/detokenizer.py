"""ids → text while they are being made, and stop strings that are found before they are shown."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from glassllama.base.errors import GenerationError, quoted
from glassllama.base.interfaces import Tokenizer

MOST_STOP_CHARACTERS = 2**16  # of all stop strings together: each is a state of the automaton


class StreamDecoder:
    """Text as soon as it is certain: the bytes of a split character wait for the rest of it.

    The pieces that `push` and `finish` return join to `tokenizer.decode(ids)`, where control tokens
    (`tokenizer.specials`) are left out: they steer the model and are not shown. An id outside the
    vocabulary is the tokenizer's TokenizerError.

    With `continues` the ids go on with a text that is already there, as in raw generation: then
    SentencePiece's blank before the first word is one, and is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._control = frozenset(tokenizer.specials.values())
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._opening: list[int] = []  # tokens read while there is no text yet
        self._has_text = continues

    def push(self, id: int) -> str:
        """The text that this token makes certain: often its own, sometimes none yet."""
        data = self._tokenizer.token_bytes(id)
        if id in self._control or not data:
            return ""
        if not self._has_text:
            data = self._without_dummy_blank(id, data)
            self._has_text = bool(data)
        return self._bytes_to_text.decode(data)

    def finish(self) -> str:
        """What was held: bytes that no character can come of any more, shown as U+FFFD."""
        return self._bytes_to_text.decode(b"", final=True)

    def _without_dummy_blank(self, id: int, data: bytes) -> bytes:
        """SentencePiece puts a blank before a text: `decode` itself shows whether to drop it."""
        if not data.startswith(b" "):
            return data
        # One token without text before this one stands for any number of them.
        self._opening = [*self._opening[:1], id]
        is_whole = self._tokenizer.decode(self._opening) == data.decode("utf-8", "replace")
        return data if is_whole else data[1:]


@dataclass(slots=True, eq=False)
class _State:
    """How much of the stop strings has just been read: a node of the Aho-Corasick automaton."""

    depth: int = 0  # characters read that may still become a stop string
    following: dict[str, _State] = field(default_factory=dict)
    fallback: _State | None = None  # the longest shorter beginning that these characters also are
    stop: str | None = None  # the longest stop string that ends here


class StopStrings:
    """Text → the part of it that is safe to show: nothing of a stop string ever is.

    The stop string that *ends* first wins; of several that end at the same character, the longest.
    What may be the beginning of a stop string is held until it is decided. Linear in the text
    however it is cut into pieces, and the same result for every cut.

    Source: Aho and Corasick, Efficient string matching (1975).
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.matched: str | None = None
        self._state = self._start = _automaton(strings)
        self._held: deque[str] = deque()  # single characters: cheap to take from the left

    def push(self, text: str) -> str:
        """What may be shown now. After a match: nothing more, ever."""
        if self.matched is not None:
            return ""
        for character in text:
            self._held.append(character)
            self._state = _advance(self._state, character)
            if self._state.stop is not None:
                self.matched = self._state.stop
                return self._release(keep=len(self.matched))
        return self._release(keep=self._state.depth)

    def finish(self) -> str:
        """The held text, where no stop string came of it."""
        if self.matched is not None:
            return ""
        self._state = self._start
        return self._release(keep=0)

    def _release(self, keep: int) -> str:
        return "".join(self._held.popleft() for _ in range(len(self._held) - keep))


def _automaton(strings: Iterable[str]) -> _State:
    if isinstance(strings, str):
        raise GenerationError(f"stop: want a list of strings, got the one string {quoted(strings)}")
    start, room = _State(), MOST_STOP_CHARACTERS
    for string in strings:
        if not isinstance(string, str) or not string:
            raise GenerationError(f"stop: want strings that are not empty, got {quoted(string)}")
        room -= len(string)
        if room < 0:
            raise GenerationError(
                f"stop: want at most {MOST_STOP_CHARACTERS:,} characters in all strings together, "
                f"got more, the last one {quoted(string)}"
            )
        state = start
        for character in string:
            state = state.following.setdefault(character, _State(depth=state.depth + 1))
        state.stop = string
    _link(start)
    return start


def _link(start: _State) -> None:
    """Set every state's fallback, shortest beginnings first."""
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        for character, after in state.following.items():
            after.fallback = (
                start if state is start else _advance(state.fallback or start, character)
            )
            after.stop = after.stop or after.fallback.stop
            waiting.append(after)


def _advance(state: _State, character: str) -> _State:
    """The state after one more character: fall back until some stop string continues with it."""
    while character not in state.following and state.fallback is not None:
        state = state.fallback
    return state.following.get(character, state)
