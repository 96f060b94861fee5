"""Random calls of engines of unusual shapes whose memory ends at guard pages: see
test_memory_safety.py.

usage: python guard_pages.py CALLS
"""

from __future__ import annotations

import faulthandler
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from glassllama.base.errors import GenerationError
from glassllama.generation import GenerationSettings, generate, make_sampler
from glassllama.native.engine import kv_cache as cache_module
from glassllama.native.engine import workspace as workspace_module
from glassllama.native.engine.executor import Engine
from glassllama.native.engine.layout import zeros as plain_zeros
from handmade_engines import SMALL, guarded_engine, handmade, with_guard_pages
from rows import Rows

NARROW = replace(SMALL, dim=1, n_heads=1, n_kv_heads=1, head_dim=16, ffn_dim=33)
WIDE = replace(SMALL, n_heads=9, n_kv_heads=3, head_dim=64, rope_layout="interleaved")
SHAPES = [
    (SMALL, "Q8_0", {}),
    (replace(SMALL, head_dim=24, n_kv_heads=1), "Q4_0", {"cache": "int8"}),
    (replace(SMALL, n_layers=1, vocab_size=1, head_dim=2), "F32", {"exact": True}),
    (replace(SMALL, dim=33, ffn_dim=7, head_dim=18, vocab_size=17, qk_norm=True), "F32", {}),
    (WIDE, "Q8_0", {"threads": 1}),
    (NARROW, "F32", {"cache": "int8"}),
]  # fmt: skip
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513]


def add_guard_pages(engine: Engine) -> None:
    """Let pages and buffers of its caches, and its logits, end at guard pages, too."""
    new = engine._new_logits
    engine._new_logits = lambda count: with_guard_pages(new(count))  # type: ignore[method-assign]
    for module in (cache_module, workspace_module):
        module.zeros = lambda dtype, *shape: with_guard_pages(plain_zeros(dtype, *shape))


def call(chance: np.random.Generator, engine: Engine, caches: list[Any]) -> None:
    """One call: append, truncate, delete a cache, generate, or make a request that must be
    refused."""
    vocab, context = engine.config.vocab_size, engine.config.max_seq_len

    def ids(count: int) -> list[int]:
        return [int(id) for id in chance.integers(0, vocab, count)]

    what = chance.choice(["new", "feed", "feed", "feed", "truncate", "all", "generate", "refused"])
    if what == "new" or not caches:
        caches.append(Rows(engine, int(chance.integers(1, 5))))
        del caches[:-3]
        return
    cache = caches[chance.integers(0, len(caches))]
    if what == "feed":
        rows = [ids(int(chance.choice([0, *LENGTHS]))) for _ in range(len(cache.lengths))]
        if chance.random() < 0.4:
            rows = [rows[0]] * len(cache.lengths)
        longest = max(n + len(row) for n, row in zip(cache.lengths, rows, strict=True))
        if longest > context:
            caches.clear()
        else:
            cache.next_logits(rows)
    elif what == "truncate":
        row = int(chance.integers(0, len(cache.lengths)))
        cache.truncate(row, int(chance.integers(0, cache.lengths[row] + 1)))
    elif what == "all":
        count = int(chance.choice(LENGTHS))
        logits = Rows(engine).all_logits(ids(count))
        assert logits.shape == (count, vocab)
        assert np.isfinite(logits).all()
    elif what == "generate":
        sampler = make_sampler(temperature=float(chance.choice([0, 1.0])), top_p=0.9, seed=1)
        settings = GenerationSettings(sampler=sampler, max_tokens=9)
        text = ids(5)
        steps = generate(engine, [text * 12, text * 12][: chance.integers(1, 3)], settings)
        for _, _step in zip(range(chance.integers(1, 20)), steps, strict=False):
            pass  # and deleted, possibly before its end
    else:
        refused(engine, cache, ids)


def refused(engine: Engine, cache: Any, ids: Any) -> None:
    context = engine.config.max_seq_len
    for ask in (
        lambda: Rows(engine).all_logits(ids(context + 1)),
        lambda: cache.next_logits([ids(context + 1)] * len(cache.lengths)),
        lambda: cache.next_logits([[engine.config.vocab_size]] * len(cache.lengths)),
    ):
        try:
            ask()
        except GenerationError:
            continue
        raise AssertionError("not refused")


def main(calls: int) -> None:
    faulthandler.enable()
    chance, done = np.random.default_rng(7), 0
    each = -(-calls // len(SHAPES))
    for config, kind, options in SHAPES:
        cache_module.zeros = workspace_module.zeros = plain_zeros
        want = handmade(config, kind, **options)
        engine = guarded_engine(config, kind, **options)
        add_guard_pages(engine)
        text = [int(id) for id in chance.integers(0, config.vocab_size, 300)]
        same = Rows(engine).all_logits(text)
        assert (same == Rows(want).all_logits(text)).all()
        caches: list[Any] = []
        for _ in range(min(each, calls - done)):
            call(chance, engine, caches)
            done += 1
    print(done, "calls")


if __name__ == "__main__":
    main(int(sys.argv[1]))
