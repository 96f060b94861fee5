"""Asking a model within a conversation: one-shot, tour and REPL all go through here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glassllama.base.errors import TokenizerError
from glassllama.cli.console import note
from glassllama.cli.conversation import Conversation
from glassllama.cli.options import SamplingOptions
from glassllama.cli.render import show_stream
from glassllama.tokenizers.chat import Message

if TYPE_CHECKING:
    from glassllama.llm import LLM, Completion

MARK = " 4f1c9a"  # makes three messages that occur nowhere else
ANSWER_SHARE = 4  # a quarter of the context is kept free for the answer


@dataclass
class Talk:
    """A model, what was said so far, and how answers are chosen."""

    llm: LLM
    conversation: Conversation
    sampling: SamplingOptions

    def ask(self, question: str) -> Completion:
        """Show the answer while it is made, and remember both.

        Of an answer that Ctrl-C stops, what was shown is remembered; a question without any answer
        is forgotten.
        """
        turns, shown = self.conversation.turns, list[str]()
        turns.append(Message("user", question))
        self._shorten()
        try:
            messages, options = self.conversation.messages, self.sampling.options()
            return show_stream(
                lambda bar: self.llm.stream_chat(messages, progress=bar, **options), shown
            )
        finally:
            if shown:
                turns.append(Message("assistant", "".join(shown)))
            else:
                turns.pop()

    @property
    def context(self) -> int:
        """The most tokens that the conversation and its next answer may have."""
        return self.llm.executor.config.max_seq_len

    def count(self, messages: Sequence[Message]) -> int:
        """Their tokens, as the model is given them."""
        return len(self.llm.chat_format.encode(messages, self.llm.tokenizer))

    def limits(self) -> str:
        """What keeps an answer from going on for ever, in words."""
        most, penalty = self.sampling.max_tokens, self.sampling.repetition_penalty
        ends = "no limit" if most is None else f"at most {most:,} tokens"
        return f"an answer has {ends}, repetition penalty {penalty:g}; /set shows and changes them"

    def text_before_first_message(self) -> str:
        """What the model reads before the first message, control tokens left out.

        That is the system message, and what the chat template puts before, around or in place of
        it. Found by writing a conversation of two questions: what stands before the first and not
        before the second is the beginning of the conversation, not of a message.
        """
        system = self.conversation.system
        opening = [] if system is None else [Message("system", system)]
        parts = [(role, f"{role}{MARK}") for role in ("user", "assistant", "user")]
        messages = [*opening, *(Message(*part) for part in parts)]
        try:
            ids = self.llm.chat_format.encode(messages, self.llm.tokenizer)
        except TokenizerError:
            return ""  # a template that wants other conversations
        text = self.llm.tokenizer.decode(ids)
        before, _, rest = text.partition(parts[0][1])
        between = rest.partition(parts[1][1])[2].partition(parts[2][1])[0]
        before = before[: len(before) - shared_suffix_length(before, between)]
        for control in sorted(self.llm.tokenizer.specials, key=len, reverse=True):
            before = before.replace(control, "")
        return before.strip().removeprefix("system").strip()

    def _shorten(self) -> None:
        answer = min(self.sampling.max_tokens or self.context, self.context // ANSWER_SHARE)
        dropped = self.conversation.shorten(self.count, self.context - answer)
        if dropped:
            note(
                f"(the context of {self.context:,} tokens is full: the oldest {dropped} messages "
                "are forgotten)"
            )


def shared_suffix_length(one: str, other: str) -> int:
    """How many characters at their ends two texts share."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
