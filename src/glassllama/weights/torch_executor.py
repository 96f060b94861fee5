"""A PyTorch model as an executor: the interface that generation drives (base/interfaces.py)."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassllama.base.errors import GenerationError
from glassllama.base.interfaces import (
    CLOSED,
    FOREIGN_CACHE,
    Capabilities,
    ModelConfig,
    NewTokens,
    TokenBatch,
    checked_ids,
    context_full,
    require_distinct,
)
from glassllama.base.interfaces import KVCache as Cache
from glassllama.base.locks import NonReentrantLock, synchronized
from glassllama.models.language_model import LanguageModel
from glassllama.nn.kv_cache import KVCache

# New tokens of one forward pass. Fixed, because it changes how sums are rounded.
PREFILL_CHUNK = 512
ENDLESS = 1 << 62  # the most tokens of a sequence of an unbounded model


class TorchCache:
    """A KV cache for each sequence (base.interfaces.KVCache)."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._caches: dict[int, KVCache] = {}
        self._numbers = itertools.count()

    def add(self) -> int:
        config = self.model.config
        longest = ENDLESS if config.unbounded else config.max_seq_len
        return self._add(self.model.new_cache(1, longest))

    def fork(self, sequence: int) -> int:
        return self._add(self.get(sequence).copy())

    def rewind(self, sequence: int, length: int) -> None:
        self.get(sequence).truncate(0, length)

    def remove(self, sequence: int) -> None:
        self.get(sequence)
        del self._caches[sequence]

    def length(self, sequence: int) -> int:
        return self.get(sequence).lengths[0]

    def reused(self, sequence: int) -> int:
        self.get(sequence)
        return 0

    def get(self, sequence: int) -> KVCache:
        if sequence not in self._caches:
            raise GenerationError(f"no sequence {sequence} in this cache: it was removed, or never")
        return self._caches[sequence]

    def _add(self, cache: KVCache) -> int:
        number = next(self._numbers)
        self._caches[number] = cache
        return number


class TorchExecutor:
    """A reference model behind the Executor interface of base/interfaces.py: any LanguageModel.

    One sequence after the other: PyTorch rounds a product differently in a batch.
    """

    capabilities = Capabilities(prefill_chunk=PREFILL_CHUNK)

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.notes: list[str] = []
        self._closed = False
        self.lock = NonReentrantLock()

    @property
    def config(self) -> ModelConfig:
        config: ModelConfig = self.model.config
        return config

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    def new_cache(self) -> TorchCache:
        return TorchCache(self.model)

    def close(self) -> None:
        """A further step raises GenerationError. The weights go with the object."""
        self._closed = True

    @synchronized
    @torch.inference_mode()
    def forward(self, batch: TokenBatch, cache: Cache) -> NDArray[np.float32]:
        """See Executor.forward."""
        if self._closed:
            raise GenerationError(CLOSED)
        if not isinstance(cache, TorchCache) or cache.model is not self.model:
            raise GenerationError(FOREIGN_CACHE)
        require_distinct(batch)
        new = [self._checked(tokens, cache) for tokens in batch]
        rows = sum(tokens.num_outputs for tokens in batch)
        logits = np.empty((rows, self.config.vocab_size), np.float32)
        before, row = [cache.length(tokens.sequence) for tokens in batch], 0
        try:
            for tokens, ids in zip(batch, new, strict=True):
                h = self.model.hidden(ids, cache.get(tokens.sequence))[0]  # (T, C)
                if count := tokens.num_outputs:
                    logits[row : row + count] = self.model.logits(h[-count:]).cpu().numpy()
                row += count
        except BaseException:
            for tokens, length in zip(batch, before, strict=True):
                cache.rewind(tokens.sequence, length)
            raise
        return logits

    def _checked(self, tokens: NewTokens, cache: TorchCache) -> Tensor:
        """The new ids as (1, T). Raises GenerationError if they cannot be fed to their sequence."""
        ids = checked_ids("new tokens", tokens.ids, self.config.vocab_size)
        length = cache.length(tokens.sequence) + len(ids)
        if length > self.config.max_seq_len and not self.config.unbounded:
            raise context_full(length, self.config.max_seq_len)
        return torch.tensor([ids], device=self.device)
