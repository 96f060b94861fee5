"""Generated text on stdout while it is generated, and its statistics."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from glassllama.base.machine import gigabytes, peak_memory
from glassllama.cli.console import console, is_terminal, note, progress_bars, write

if TYPE_CHECKING:
    from rich.live import Live

    from glassllama.base.interfaces import Progress
    from glassllama.llm import LLM, Completion, TextStream
    from glassllama.tokenizers.reasoning import Piece

PREFILL_BAR_SECONDS = 2.0  # a prompt that is processed sooner gets no progress bar
DEFAULT_WIDTH = 80  # columns
REASONING_LINES = 6  # of reasoning that are shown while it is generated


class WordWrap:
    """Breaks streamed text between words: pieces in, pieces with line breaks out.

    A word is buffered until its end is known or it is as long as a line. `width` is in terminal
    columns; None changes nothing.
    """

    def __init__(self, width: int | None) -> None:
        self._width = width
        self._column = 0
        self._word = ""
        self._word_width = 0

    def push(self, piece: str) -> str:
        """The text that can be shown now."""
        return piece if self._width is None else "".join(map(self._add, piece))

    def finish(self) -> str:
        """The buffered word."""
        word, width, self._word, self._word_width = self._word, self._word_width, "", 0
        if not word or self._width is None:
            return word
        fits = self._column + width <= self._width
        self._column = width + (self._column if fits else 0)
        return word if fits else "\n" + word

    def _add(self, character: str) -> str:
        from rich.cells import cell_len

        assert self._width is not None
        if character == "\n":
            text = self.finish() + character
            self._column = 0
            return text
        if character == " ":
            text = self.finish()
            full = self._column >= self._width  # the line break replaces the space
            self._column = 0 if full else self._column + 1
            return text + ("\n" if full else " ")
        width = cell_len(character)  # before and after a wide character a line may break
        text = self.finish() if width > 1 or self._word_width + width > self._width else ""
        self._word += character
        self._word_width += width
        return text + (self.finish() if width > 1 else "")


def terminal_width(stream: IO[Any]) -> int | None:
    """Columns of the terminal that a stream is; None if it is not one."""
    if not is_terminal(stream):
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_WIDTH
    except (OSError, ValueError):
        return DEFAULT_WIDTH


def wrapped(text: str, stream: IO[Any]) -> str:
    """`text` with line breaks between words, if `stream` is a terminal."""
    wrap = WordWrap(terminal_width(stream))
    return wrap.push(text) + wrap.finish()


class ReasoningView:
    """Reasoning while it is generated: its last lines, dim, on stderr if that is a terminal.

    They disappear at the end: then a line says how long it was.
    """

    def __init__(self) -> None:
        width = terminal_width(sys.stderr)
        self._wrap = WordWrap(width)
        self._lines = [""]
        self._live: Live | None = None
        self._is_shown = width is not None

    def show(self, text: str) -> None:
        if not self._is_shown:
            return
        from rich.live import Live
        from rich.text import Text

        more = self._wrap.push(text).split("\n")
        self._lines = [*self._lines[:-1], self._lines[-1] + more[0], *more[1:]][-REASONING_LINES:]
        if self._live is None:
            self._live = Live(console=console("stderr"), transient=True)
            self._live.start()
        self._live.update(Text("\n".join(["thinking …", *self._lines]), style="dim"))

    def close(self, stream: TextStream) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            note(f"thought for {stream.completion.reasoning_tokens:,} tokens")


def show_stream(start: Callable[[Progress | None], TextStream], shown: list[Piece]) -> Completion:
    """Print the answer of a stream as it comes, then a line end; reasoning is shown for a while.

    `start` begins the stream; its argument is a progress bar for long prompts. The pieces are
    appended to `shown`, for callers whose stream is interrupted.
    """
    with progress_bars() as bar:
        stream = start(bar("reading the prompt", "tokens", after=PREFILL_BAR_SECONDS))
        pieces = stream.pieces()
        first = [*itertools.islice(pieces, 1)]
    wrap, view, last = WordWrap(terminal_width(sys.stdout)), ReasoningView(), ""
    try:
        for piece in itertools.chain(first, pieces):
            shown.append(piece)
            if piece.kind == "content":
                view.close(stream)
                last = piece.text
                write(wrap.push(piece.text))
            else:
                view.show(piece.text)
    finally:
        view.close(stream)
        write(wrap.finish() + "\n" * (not last.endswith("\n")))
    completion = stream.completion
    if completion.reasoning_content and not completion.text:
        note(
            "(no answer: all tokens went into reasoning; --max-tokens gives more, --no-think none)"
        )
    return completion


def speed_line(completion: Completion) -> str:
    """`prefill 812 tok/s · decode 212 tok/s · 64 tokens · peak memory 310 MB`, what is known."""
    timings, peak = completion.timings, peak_memory()
    parts = [
        timings.prefill_rate is not None and f"prefill {timings.prefill_rate:,.0f} tok/s",
        timings.decode_rate is not None and f"decode {timings.decode_rate:,.0f} tok/s",
        f"{timings.new_tokens} tokens",
        peak is not None and f"peak memory {gigabytes(peak)}",
    ]
    if completion.dropped_tokens:
        parts.append(f"{completion.dropped_tokens:,} oldest tokens dropped: the context was full")
    if completion.finish_reason == "length":
        parts.append("cut off: --max-tokens or the context's end")
    return " · ".join(part for part in parts if part)


def completion_json(llm: LLM, completion: Completion) -> dict[str, Any]:
    """The object that `generate --json` and `chat --json` print."""
    timings = completion.timings
    prompt, new = len(completion.prompt_ids), len(completion.ids)
    logprobs = completion.logprobs
    return {
        "model": llm.name,
        "prompt_ids": completion.prompt_ids,
        "ids": completion.ids,
        "text": completion.text,
        "reasoning_content": completion.reasoning_content,
        "finish_reason": completion.finish_reason,
        **({} if logprobs is None else {"logprobs": [asdict(token) for token in logprobs]}),
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "reasoning_tokens": completion.reasoning_tokens,  # of them
            "total_tokens": prompt + new,
            "dropped_tokens": completion.dropped_tokens,  # where the context was full
            "drafted_tokens": timings.drafted,  # by speculation
            "accepted_tokens": timings.accepted,
        },
        "timings": {
            "load_s": llm.load_seconds,
            "ttft_s": timings.prefill_s,  # the prefill yields the first token
            "prefill_tok_s": timings.prefill_rate,
            "decode_tok_s": timings.decode_rate,
        },
    }
