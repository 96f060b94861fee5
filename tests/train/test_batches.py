"""Batches are a pure function of seed and step; every token is used once per epoch."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glassllama.base.errors import ConfigError, GlassError
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.train.tokens import (
    IGNORED,
    Batch,
    Batches,
    Tokens,
    bytes_of_batch,
    every_window,
    windows_at,
)
from tolerances import assert_logits


def tokens(*documents: int) -> Tokens:
    """Documents of these lengths; every token is its own position, so that it can be identified."""
    ends = np.cumsum(documents)
    return Tokens(
        path=Path("made up"),
        ids=np.arange(ends[-1], dtype=np.uint32),
        starts=np.concatenate(([0], ends[:-1])).astype(np.int64),
        sha256="",
    )


def same(one: Batch, other: Batch) -> bool:
    assert (one.segments is None) == (other.segments is None)
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)


def test_targets_are_the_next_tokens() -> None:
    batch = Batches(tokens(1000), context=16, batch=8, seed=3).at(5)
    assert batch.ids.shape == batch.targets.shape == (8, 16)
    assert batch.ids.dtype == batch.targets.dtype == np.int64
    assert np.array_equal(batch.targets, batch.ids + 1)
    assert batch.segments is None


def test_a_batch_does_not_depend_on_earlier_batches() -> None:
    one = Batches(tokens(1000), context=16, batch=8, seed=3)
    forward = [one.at(step) for step in range(40)]
    for step in (39, 0, 17, 17, 3):  # several epochs apart
        assert same(Batches(tokens(1000), context=16, batch=8, seed=3).at(step), forward[step])
        assert same(one.at(step), forward[step])
    other = Batches(tokens(1000), context=16, batch=8, seed=4)
    assert not same(other.at(0), forward[0])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_any_number_of_workers_sees_the_same_stream(world: int) -> None:
    whole = Batches(tokens(100, 7, 400), context=8, batch=12, seed=1)
    for step in range(20):
        parts = [
            Batches(tokens(100, 7, 400), context=8, batch=12, seed=1).at(step, rank, world)
            for rank in range(world)
        ]
        together = whole.at(step)
        for at, field in enumerate(together):
            assert field is not None
            assert np.array_equal(np.concatenate([part[at] for part in parts]), field)


def test_batch_sizes_that_cannot_be_divided_among_ranks() -> None:
    batches = Batches(tokens(100), context=8, batch=12, seed=1)
    for rank, world in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(ConfigError, match="batch of 12"):
            batches.at(0, rank, world)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 400),
    context=st.integers(1, 50),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 5),
)
def test_an_epoch_contains_every_window_once(
    length: int, context: int, seed: int, epoch: int
) -> None:
    if length <= context:
        with pytest.raises(GlassError, match="too few"):
            Batches(tokens(length), context=context, batch=1, seed=seed)
        return
    batches = Batches(tokens(length), context=context, batch=1, seed=seed)
    steps = range(epoch * batches.windows, (epoch + 1) * batches.windows)
    seen = np.concatenate([batches.at(step).targets.ravel() for step in steps])
    assert len(np.unique(seen)) == len(seen) == batches.windows * context
    assert 1 <= seen.min() <= seen.max() < length
    # An epoch leaves out less than two windows, at the ends.
    assert length - 1 - len(seen) < 2 * context


def test_epochs_differ_and_together_contain_every_token() -> None:
    batches = Batches(tokens(203), context=20, batch=3, seed=0)
    seen = [batches.at(step).targets for step in range(200 * batches.windows // 3)]
    assert np.array_equal(np.unique(np.concatenate(seen)), np.arange(1, 203))
    assert len({batches.shuffled(epoch).min() for epoch in range(40)}) > 10


def test_a_batch_of_many_epochs_is_its_windows_one_by_one() -> None:
    batches = Batches(tokens(203), context=20, batch=1, seed=5)
    one_by_one = [int(batches.at(number).ids[0, 0]) for number in range(100)]
    assert batches.window_starts(0, 100).tolist() == one_by_one
    assert batches.window_starts(37, 50).tolist() == one_by_one[37:87]
    assert batches.windows == 9  # so that these were a dozen epochs


@pytest.mark.parametrize("documents", [(70_000,), (30_000, 5_000, 35_000)])
def test_the_size_of_a_batch_in_bytes(documents: tuple[int, ...]) -> None:
    corpus, rows, context = tokens(*documents), 2000, 100
    starts = np.arange(rows) * 30
    tracemalloc.start()
    windows_at(corpus, starts, context)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    counted = bytes_of_batch(corpus, rows, context)
    assert 0.98 * peak < counted < 1.4 * peak


@pytest.mark.parametrize("documents", [(40, 1, 1, 30, 80), (1,) * 60, (64, 64), (200,)])
def test_documents_are_numbered_and_targets_at_boundaries_are_ignored(
    documents: tuple[int, ...],
) -> None:
    corpus = tokens(*documents)
    owner = np.repeat(np.arange(len(documents)), documents)
    batches = Batches(corpus, context=16, batch=4, seed=2)
    for step in range(12):
        ids, targets, segments = batches.at(step)
        if len(documents) == 1:
            assert segments is None
            continue
        assert segments is not None
        assert np.array_equal(segments, owner[ids] - owner[ids[:, :1]])
        crossing = owner[np.minimum(ids + 1, len(owner) - 1)] != owner[ids]
        assert np.array_equal(targets, np.where(crossing, IGNORED, ids + 1))


def test_packed_windows_give_each_documents_own_loss() -> None:
    """The loss of a packed row equals that of its documents alone."""
    corpus = tokens(9, 4, 12)
    config = GPTConfig(
        dim=12, n_layers=2, n_heads=2, ffn_dim=20, vocab_size=25, max_seq_len=24
    )  # fmt: skip
    model = GPT(config)
    model.initialize(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data *= 10.0
    ids, targets, segments = (torch.tensor(part) for part in Batches(corpus, 24, 1, 0).at(0))
    losses = torch.nn.functional.cross_entropy(
        model(ids, segments=segments)[0], targets[0], reduction="none"
    )
    alone = []
    for piece in torch.arange(25).split([9, 4, 12]):
        logits = model(piece[None, :-1])[0]
        alone.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none"))
    counted = losses[targets[0] != IGNORED]
    assert len(counted) == 25 - 3
    assert_logits(counted.detach(), torch.cat(alone).detach(), config)


@pytest.mark.parametrize("length", [17, 18, 32, 33, 49, 100])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_evaluation_windows_contain_every_target_once(length: int, batch: int) -> None:
    rows = list(every_window(tokens(length), 16, batch))
    targets = np.concatenate([row.targets.ravel() for row in rows])
    assert sorted(targets[targets != IGNORED]) == list(range(1, length))
    assert all(row.ids.shape[1] == 16 and len(row.ids) <= batch for row in rows)
    for row in rows:
        known = row.targets != IGNORED
        assert np.array_equal(row.targets[known], row.ids[known] + 1)


def test_the_error_for_a_short_corpus_contains_both_lengths() -> None:
    for ask in (lambda t: Batches(t, 16, 1, 0), lambda t: list(every_window(t, 16, 1))):
        with pytest.raises(GlassError, match=r"16 tokens are too few for a context of 16"):
            ask(tokens(16))
