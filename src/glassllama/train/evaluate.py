"""Loss, validation and samples: what a model is worth while it is trained.

Shapes: B batch, T tokens, C model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glassllama.base.interfaces import Tokenizer
from glassllama.generation.sampler import make_sampler
from glassllama.models.language_model import LanguageModel
from glassllama.train.batches import IGNORED, Batch, every_window
from glassllama.train.distributed import SINGLE_PROCESS, DistContext
from glassllama.train.model_factory import as_module
from glassllama.train.tokens import Tokens

EVAL_POSITIONS = 8192  # positions of a batch of validation windows
TEMPERATURE = 0.8  # of samples


def summed_loss(model: LanguageModel, h: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """(B, T, C) hidden states, (B, T) targets -> the sum of -log p over all targets, float32.

    With a vocabulary of 128,000 the logits of a batch would be by far its largest tensor. Here
    logits of `chunk` positions exist at once: the backward pass recomputes those of each chunk
    from its hidden states.
    """
    h, targets = h.flatten(0, 1), targets.flatten()  # (B·T, C), (B·T,)
    if len(h) <= chunk:
        return chunk_loss(model, h, targets)
    losses = [
        checkpoint(chunk_loss, model, *piece, use_reentrant=False)
        for piece in zip(h.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()


def chunk_loss(model: LanguageModel, h: Tensor, targets: Tensor) -> Tensor:
    logits = model.logits(h).float()  # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


# --- validation -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Score:
    """`val_loss` in nats per token; `val_error`: its standard error over random windows."""

    val_loss: float
    val_error: float
    bits_per_byte: float


@torch.no_grad()  # not inference_mode: sharded weights gathered in it could not be trained after
def evaluate(
    model: LanguageModel,
    tokens: Tokens,
    context: int,
    tokenizer: Tokenizer,
    dist: DistContext = SINGLE_PROCESS,
) -> Score:
    """The loss over windows of `context` tokens that cover all of `tokens`, each target once.

    Every rank computes its share of the windows; all get the same score.
    """
    module = as_module(model)
    device, training = next(module.parameters()).device, module.training
    module.eval()
    sums, counts = [], []
    for batch in every_window(tokens, context, max(1, EVAL_POSITIONS // context)):
        losses = row_losses(model, rows_of_rank(batch, dist), device)
        sums.append(of_all_ranks(losses, dist)[: len(batch.ids)])
        counts.append((batch.targets != IGNORED).sum(axis=1))
    module.train(training)
    return score(torch.cat(sums).double().cpu().numpy(), np.concatenate(counts), tokens, tokenizer)


def row_losses(model: LanguageModel, batch: Batch, device: torch.device) -> Tensor:
    """The summed loss of each row, (B,)."""
    ids, targets = (torch.from_numpy(a).to(device) for a in (batch.ids, batch.targets))
    segments = None if batch.segments is None else torch.from_numpy(batch.segments).to(device)
    h = model.hidden(ids, segments=segments)  # (B, T, C)
    rows = zip(h.split(1), targets.split(1), strict=True)
    return torch.stack([summed_loss(model, *row, EVAL_POSITIONS) for row in rows])


def rows_of_rank(batch: Batch, dist: DistContext) -> Batch:
    """Every world-th row; equally many for all ranks, so that some of the last rows repeat."""
    if dist.is_single:
        return batch
    rows = np.arange(dist.rank, dist.rank + len(batch.ids), dist.world)
    rows = np.minimum(rows, len(batch.ids) - 1)
    segments = None if batch.segments is None else batch.segments[rows]
    return Batch(batch.ids[rows], batch.targets[rows], segments)


def of_all_ranks(values: Tensor, dist: DistContext) -> Tensor:
    """(n,) of the rows of this rank -> (n · world,) of all ranks, in the rows' order."""
    table = values.new_zeros(len(values), dist.world)
    table[:, dist.rank] = values
    return dist.sum(table).flatten()


def score(
    sums: np.ndarray[tuple[int], np.dtype[np.float64]],
    counts: np.ndarray[tuple[int], np.dtype[np.int64]],
    tokens: Tokens,
    tokenizer: Tokenizer,
) -> Score:
    """From the summed loss and the number of targets of each window, (windows,) both."""
    loss = sums.sum() / counts.sum()
    # Standard error of a ratio of sums: Cochran, Sampling Techniques (1977), section 2.11.
    rest = sums - loss * counts
    spread = math.sqrt(float((rest**2).sum()) / max(1, len(sums) - 1) / len(sums))
    lengths = [len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)]
    bytes_ = int(np.bincount(tokens.ids, minlength=tokenizer.vocab_size) @ np.array(lengths))
    return Score(
        val_loss=float(loss),
        val_error=spread / float(counts.mean()),
        bits_per_byte=float(loss) / math.log(2) * len(tokens) / bytes_,
    )


# --- samples --------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: LanguageModel, prompt: Sequence[int], count: int, seed: int, vocab_size: int
) -> list[int]:
    """`count` ids below `vocab_size` that follow the prompt, for any size of the context.

    When the context is full, the last half of it is read again into an empty cache.
    """
    module = as_module(model)
    training, device = module.training, next(module.parameters()).device
    module.eval()
    context = model.config.max_seq_len
    ids, unread = list(prompt), list(prompt)[-context // 2 or -1 :]
    sampler = make_sampler(temperature=TEMPERATURE, seed=seed).start(ids, vocab_size)
    cache = model.new_cache(1, context)
    for _ in range(count):
        if cache.lengths[0] + len(unread) > context:
            cache, unread = model.new_cache(1, context), ids[-(context // 2 or 1) :]
        h = model.hidden(torch.tensor([unread], device=device), cache)  # (1, T, C)
        ids.append(sampler.choose(model.logits(h[0, -1])[:vocab_size].cpu().numpy()))
        unread = ids[-1:]
    module.train(training)
    return ids[len(prompt) :]
