"""The bigram against counts: after training it predicts the frequency of each pair of
characters."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from glassllama.models.bigram import Bigram, BigramConfig

TEXT = "the quick brown fox jumps over the lazy dog. the dog sleeps; the fox does not. " * 3
LETTERS = sorted(set(TEXT))
V = len(LETTERS)
IDS = np.array([LETTERS.index(letter) for letter in TEXT])


def counted() -> np.ndarray:
    """The frequency of b after a, relative to all characters after a: (V, V)."""
    pairs = np.zeros((V, V))
    for a, b in pairwise(IDS):
        pairs[a, b] += 1
    return pairs / pairs.sum(1, keepdims=True)


def test_trained_probabilities_equal_frequencies() -> None:
    model = Bigram(BigramConfig(vocab_size=V, max_seq_len=len(IDS)))
    model.initialize(torch.Generator().manual_seed(0))
    ids, targets = torch.tensor(IDS[None, :-1]), torch.tensor(IDS[1:])
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1, max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(ids)[0], targets)
        value.backward()
        return value

    optimizer.step(loss)
    table = counted()
    trained = model.logits(model.tok_embeddings.weight).softmax(-1).detach().numpy()
    assert np.abs(trained - table).max() < 2e-3
    exact = -np.log(table[IDS[:-1], IDS[1:]]).mean()  # nats: the minimum for a bigram
    assert exact <= loss().item() < exact + 1e-3


def test_logits_depend_on_the_last_token_only() -> None:
    model = Bigram(BigramConfig(vocab_size=V, max_seq_len=99))
    ids = torch.tensor([[1, 2, 3, 4], [4, 2, 3, 1]])
    logits = model(ids)
    assert logits.shape == (2, 4, V)
    assert torch.equal(logits[0, 1:3], logits[1, 1:3])
    assert torch.equal(logits[0, 0], model.tok_embeddings.weight[1])
    segments = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0]])
    assert torch.equal(model(ids, segments=segments), logits)


def test_its_cache_stores_only_lengths() -> None:
    model = Bigram(BigramConfig(vocab_size=V, max_seq_len=9))
    cache = model.new_cache(2, 600)
    model(torch.zeros(2, 300, dtype=torch.long), cache, lengths=[300, 2])
    model(torch.zeros(2, 1, dtype=torch.long), cache)
    assert cache.lengths == [301, 3]
    assert cache.keys.numel() == 0
    cache.truncate(0, 7)
    assert cache.lengths == [7, 3]
