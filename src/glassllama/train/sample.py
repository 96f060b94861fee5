"""A piece of text by the model in training, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glassllama.generation.sampler import make_sampler
from glassllama.models.language_model import LanguageModel
from glassllama.train.model_factory import as_module

TEMPERATURE = 0.8


@torch.no_grad()  # not inference_mode: weights gathered in it cannot be trained after
def sample(
    model: LanguageModel, prompt: Sequence[int], count: int, seed: int, vocab_size: int
) -> list[int]:
    """`count` ids below `vocab_size` that follow the prompt, however small the model's context is.

    Where the context is full, the text goes on from its last half, read anew.
    """
    module = as_module(model)
    learning, device = module.training, next(module.parameters()).device
    module.eval()
    context = model.config.max_seq_len
    ids, unread = list(prompt), list(prompt)[-context // 2 or -1 :]
    sampling = make_sampler(temperature=TEMPERATURE, seed=seed).start(ids, vocab_size)
    cache = model.new_cache(1, context)
    for _ in range(count):
        if cache.lengths[0] + len(unread) > context:
            cache, unread = model.new_cache(1, context), ids[-(context // 2 or 1) :]
        h = model.hidden(torch.tensor([unread], device=device), cache)  # (1, T, C)
        ids.append(sampling.choose(model.logits(h[0, -1])[:vocab_size].cpu().numpy()))
        unread = ids[-1:]
    module.train(learning)
    return ids[len(prompt) :]
