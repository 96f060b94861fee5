"""An answer on its way to the screen, and what is said about it afterwards."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glassllama.cli.console import console, is_terminal, progress_bars, write
from glassllama.cli.memory import peak_memory
from glassllama.cli.wrap import Unwrapped, WordWrap

if TYPE_CHECKING:
    from glassllama.base.interfaces import Progress
    from glassllama.llm import LLM, Completion, TextStream

PATIENCE_SECONDS = 2.0  # a prompt that is read sooner needs no bar


def show_stream(start: Callable[[Progress | None], TextStream], shown: list[str]) -> Completion:
    """Print the pieces as they are made, and a line end -> the whole answer.

    `start` begins the stream and gets a bar, for prompts that take long to read. `shown` receives
    the pieces, for the caller whose stream is stopped halfway.
    """
    with progress_bars() as bar:
        stream = start(bar("reading the prompt", "tokens", after=PATIENCE_SECONDS))
        shown += itertools.islice(stream, 1)
    lines = WordWrap(console("stdout").width) if is_terminal(sys.stdout) else Unwrapped()
    write(lines.push("".join(shown)))
    try:
        for piece in stream:
            shown.append(piece)
            write(lines.push(piece))
    finally:
        write(lines.finish() + "\n" * (not "".join(shown).endswith("\n")))
    return stream.completion


def speed_line(completion: Completion) -> str:
    """`prefill 812 tok/s · decode 212 tok/s · peak memory 310 MB`, as far as it is known."""
    from glassllama.base.machine import gigabytes

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


def as_object(llm: LLM, completion: Completion) -> dict[str, Any]:
    """The one object that `generate --json` and `chat --json` print."""
    timings = completion.timings
    answer: dict[str, Any] = {
        "model": llm.name,
        "prompt_ids": completion.prompt_ids,
        "ids": completion.ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        answer["logprobs"] = [asdict(token) for token in completion.logprobs]
    prompt, new = len(completion.prompt_ids), len(completion.ids)
    return answer | {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "dropped_tokens": completion.dropped_tokens,  # where the context was full
            "drafted_tokens": timings.drafted,  # guessed, see generation/speculation.py
            "accepted_tokens": timings.accepted,  # of them, those that were right
        },
        "timings": {
            "load_s": llm.load_seconds,
            "ttft_s": timings.prefill_s,  # the first token comes out of the prefill
            "prefill_tok_s": timings.prefill_rate,
            "decode_tok_s": timings.decode_rate,
        },
    }
