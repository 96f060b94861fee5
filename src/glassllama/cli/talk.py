"""Asking a model within a conversation: one-shot, tour and REPL all go through here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glassllama.cli.answer import show_stream
from glassllama.cli.conversation import Conversation
from glassllama.cli.options import SamplingOptions
from glassllama.cli.screen import note
from glassllama.tokenizers.chat import Message

if TYPE_CHECKING:
    from glassllama.llm import LLM, Completion

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

    def _shorten(self) -> None:
        answer = min(self.sampling.max_tokens or self.context, self.context // ANSWER_SHARE)
        dropped = self.conversation.shorten(self.count, self.context - answer)
        if dropped:
            note(
                f"(the context of {self.context:,} tokens is full: the oldest {dropped} messages "
                "are forgotten)"
            )
