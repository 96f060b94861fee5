"""Ids without a token: a model may have more rows of embeddings than its tokenizer has tokens.

Sizes are rounded up for speed: nanoGPT has 50,304 rows for GPT-2's 50,257 tokens. Between tokens
there may be gaps, where tokens were added at round numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from glassllama.base.errors import TokenizerError

LARGEST_VOCABULARY = 2**22  # sixteen times Gemma's; a larger id in a file is damage
MOST_GAPS = 2**17  # ids without a token; a file that claims more of them is damaged, too


class Rows:
    """A tokenizer that knows how many rows its model has; 0 where there is no model."""

    model_rows = 0
    gaps: Sequence[int] = ()  # ids below `vocab_size` that have no token

    def bytes_without_token(self, id: int, size: int) -> bytes:
        """No text for an id of the model's; TokenizerError for any other."""
        if 0 <= id < self.model_rows:
            return b""
        last = max(size, self.model_rows) - 1
        raise TokenizerError(f"id {id}: not in the vocabulary, which has 0 … {last}")


def rows_of(ids: Collection[int]) -> int:
    """One more than the largest of a vocabulary's ids. TokenizerError: far more than it has."""
    size, most = max(ids, default=-1) + 1, min(LARGEST_VOCABULARY, len(ids) + MOST_GAPS)
    if min(ids, default=0) < 0 or size > most:
        raise TokenizerError(
            f"vocabulary: ids run from {min(ids)} to {size - 1}; expected 0 to at most {most - 1} "
            f"for {len(ids)} tokens"
        )
    return size


def gaps_in(tokens: Sequence[object | None]) -> list[int]:
    """Where a list of tokens by id has none."""
    return [id for id, token in enumerate(tokens) if token is None] if None in tokens else []
