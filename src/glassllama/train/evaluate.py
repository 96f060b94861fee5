"""How good a model is on text that it did not learn from: every token of it, not a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glassllama.base.interfaces import Tokenizer
from glassllama.models.language_model import LanguageModel
from glassllama.train.batches import Batch, every_window
from glassllama.train.distributed import ALONE, Team
from glassllama.train.loss import IGNORED, summed_loss
from glassllama.train.model_factory import as_module
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


@torch.no_grad()  # not inference_mode: weights gathered in it cannot be trained after
def evaluate(
    model: LanguageModel,
    tokens: Tokens,
    context: int,
    tokenizer: Tokenizer,
    team: Team = ALONE,
) -> Score:
    """The loss over windows of `context` tokens that cover all of `tokens`, each target once.

    The ranks of a team share the windows out, and get the same score.
    """
    module = as_module(model)
    device, learning = next(module.parameters()).device, module.training
    module.eval()
    sums, counts = [], []
    for batch in every_window(tokens, context, max(1, POSITIONS_AT_ONCE // context)):
        mine = losses(model, rows_of_rank(batch, team), device)
        sums.append(of_all_ranks(mine, team)[: len(batch.ids)])
        counts.append((batch.targets != IGNORED).sum(axis=1))
    module.train(learning)
    return score(torch.cat(sums).double().cpu().numpy(), np.concatenate(counts), tokens, tokenizer)


def losses(model: LanguageModel, batch: Batch, device: torch.device) -> Tensor:
    """The summed loss of each row, (B,)."""
    ids, targets = (torch.from_numpy(a).to(device) for a in (batch.ids, batch.targets))
    segments = None if batch.segments is None else torch.from_numpy(batch.segments).to(device)
    h = model.hidden(ids, segments=segments)  # (B, T, C)
    rows = zip(h.split(1), targets.split(1), strict=True)
    return torch.stack([summed_loss(model, *row, POSITIONS_AT_ONCE) for row in rows])


def rows_of_rank(batch: Batch, team: Team) -> Batch:
    """Every world-th row; all ranks get equally many, some of the last ones once more."""
    if team.alone:
        return batch
    places = np.arange(team.rank, team.rank + len(batch.ids), team.world)
    places = np.minimum(places, len(batch.ids) - 1)
    segments = None if batch.segments is None else batch.segments[places]
    return Batch(batch.ids[places], batch.targets[places], segments)


def of_all_ranks(mine: Tensor, team: Team) -> Tensor:
    """(n,) of each rank's rows -> (n · world,) in the rows' order."""
    table = mine.new_zeros(len(mine), team.world)
    table[:, team.rank] = mine
    return team.total(table).flatten()


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
