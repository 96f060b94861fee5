"""How good a model is on text that it did not learn from: every token of it, not a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from glassllama.base.interfaces import Tokenizer
from glassllama.models.language_model import LanguageModel
from glassllama.train.batches import every_window
from glassllama.train.build import as_module
from glassllama.train.loss import IGNORED, summed_loss
from glassllama.train.tokens import Tokens

POSITIONS_AT_ONCE = 8192  # of which logits are held


@dataclass(frozen=True, kw_only=True)
class Score:
    """`val_loss` in nats per token, `val_error` its standard error, as if windows were drawn."""

    val_loss: float
    val_error: float
    bits_per_byte: float

    def __str__(self) -> str:
        return f"{self.val_loss:.4f} ± {self.val_error:.4f} ({self.bits_per_byte:.3f} bits a byte)"


@torch.inference_mode()
def evaluate(model: LanguageModel, tokens: Tokens, context: int, tokenizer: Tokenizer) -> Score:
    """The loss over windows of `context` tokens that cover all of `tokens`, each target once."""
    module = as_module(model)
    device, learning = next(module.parameters()).device, module.training
    module.eval()
    sums, counts = [], []
    for batch in every_window(tokens, context, max(1, POSITIONS_AT_ONCE // context)):
        ids, targets = (torch.from_numpy(a).to(device) for a in (batch.ids, batch.targets))
        segments = None if batch.segments is None else torch.from_numpy(batch.segments).to(device)
        h = model.hidden(ids, segments=segments)  # (B, T, C)
        for row in range(len(ids)):
            one = slice(row, row + 1)
            sums.append(summed_loss(model, h[one], targets[one], POSITIONS_AT_ONCE))
            counts.append(int((batch.targets[row] != IGNORED).sum()))
    module.train(learning)
    return score(torch.stack(sums).double().cpu().numpy(), np.array(counts), tokens, tokenizer)


def score(
    sums: np.ndarray[tuple[int], np.dtype[np.float64]],
    counts: np.ndarray[tuple[int], np.dtype[np.int64]],
    tokens: Tokens,
    tokenizer: Tokenizer,
) -> Score:
    """From the summed loss and the number of targets of each window, (windows,) both."""
    loss = sums.sum() / counts.sum()
    # The error of a ratio of sums (Cochran, Sampling Techniques, 1977, section 2.11).
    rest = sums - loss * counts
    spread = math.sqrt(float((rest**2).sum()) / max(1, len(sums) - 1) / len(sums))
    return Score(
        val_loss=float(loss),
        val_error=spread / float(counts.mean()),
        bits_per_byte=float(loss) / math.log(2) * len(tokens) / text_bytes(tokens, tokenizer),
    )


def text_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """How many bytes of text these tokens are."""
    lengths = [len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)]
    counts = np.bincount(tokens.ids, minlength=tokenizer.vocab_size)
    return int(counts @ np.array(lengths))
