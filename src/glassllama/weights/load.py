"""A checkpoint → the PyTorch model, whole in memory or with the weights of one layer at a time.

`load_model` builds the reference model without memory and fills it one tensor at a time.
`streamed_model`, for models larger than memory, leaves the weights of blocks on the meta device,
where a weight is a shape without data. A layer is filled from the file when it is called
and emptied afterwards; embeddings are read row by row, the output matrix in blocks of rows. After
reading, both our memory and the mapped pages of the file are released. Every forward pass reads the
whole file, so it is slow.

`TorchExecutor` is the interface that generation uses (base/interfaces.py), for any model.

Shapes: B batch, T new tokens, C model width, V vocabulary, N rows that were read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from glassllama.base.errors import ConfigError, GenerationError, MemoryShortError, quoted
from glassllama.base.interfaces import (
    CLOSED,
    FOREIGN_CACHE,
    Capabilities,
    ModelConfig,
    NewTokens,
    Progress,
    TokenBatch,
    checked_tokens,
    require_distinct,
)
from glassllama.base.interfaces import KVCache as Cache
from glassllama.base.locks import NonReentrantLock, synchronized
from glassllama.base.machine import available_memory, gigabytes, require_memory
from glassllama.models.language_model import LanguageModel
from glassllama.nn.attention import ForwardContext
from glassllama.nn.init import shapes_only
from glassllama.nn.kv_cache import KVCache
from glassllama.weights.backend import (
    BLOCK_NUMBERS,
    EMBEDDINGS,
    OUTPUT,
    PYTORCH_ITSELF,
    WORKING_MEMORY,
    estimate_memory,
    streamed_memory,
)
from glassllama.weights.checkpoint import Checkpoint


def load_model(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """The reference model with this checkpoint's weights, on `device`, in evaluation mode.

    `dtype` None leaves bfloat16 files as they are and makes everything else float32. Peak memory is
    the model and its largest tensor. Raises MemoryShortError before it allocates.
    """
    dtype = default_dtype(checkpoint) if dtype is None else dtype
    if torch.device(device).type == "cpu":
        elements = sum(math.prod(checkpoint.info(ours).shape) for ours in checkpoint.names)
        require_free_memory(checkpoint, dtype, elements * dtype.itemsize + WORKING_MEMORY)
    with shapes_only():
        model: LanguageModel = checkpoint.architecture.model_class()(checkpoint.config).to(dtype)
    for done, ours in enumerate(checkpoint.names, start=1):
        set_parameter(model, ours, as_tensor(checkpoint, ours, dtype, torch.device(device)))
        checkpoint.release_pages(ours)
        if progress is not None:
            progress(done, len(checkpoint.names))
    return model.requires_grad_(False).eval()


def torch_device(name: str, field: str = "device") -> torch.device:
    """The device with this name. Raises ConfigError naming `field` if it is not available.

    PyTorch's own message about a device that it was not built for has 7,000 characters.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("shapes without data")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):
        there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        raise ConfigError(
            f"{field}: {quoted(name)} cannot be used here; on this machine PyTorch has "
            f"{', '.join(there)}"
        ) from None
    return device


def require_free_memory(checkpoint: Checkpoint, dtype: torch.dtype, needed: int) -> None:
    """Raise MemoryShortError with advice if fewer than `needed` bytes are free."""
    free = available_memory()
    if free is None or needed <= free:
        return
    advice = "use a smaller model"
    if checkpoint.architecture.layer_plan is not None:  # others are neither packed nor streamed
        advice = estimate_memory(checkpoint, tokens=1, memory=free).advice()
    raise MemoryShortError(
        f"{checkpoint.path.name} in {str(dtype).removeprefix('torch.')} needs {gigabytes(needed)} "
        f"of memory, {gigabytes(free)} are free; {advice}"
    )


def default_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 if the file's matrices are, else float32."""
    stored = checkpoint.info("tok_embeddings.weight").dtype
    return torch.bfloat16 if stored == "BF16" else torch.float32


def as_tensor(
    checkpoint: Checkpoint, ours: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One tensor as `dtype` on `device`; never a view of the file."""
    if checkpoint.info(ours).dtype == "BF16" and dtype == torch.bfloat16:
        bits = np.array(checkpoint.read(ours).view(np.uint16))  # NumPy has no bfloat16
        return torch.from_numpy(bits).view(torch.bfloat16).to(device)
    return torch.from_numpy(checkpoint.float32(ours)).to(device=device, dtype=dtype)


def set_parameter(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter, which may so far have been a shape without data."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, torch.nn.Parameter(tensor, requires_grad=False))


# --- one layer at a time --------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Reads weights as `dtype` on `device`, and releases the file's pages after each read."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device

    def tensor(self, ours: str) -> Tensor:
        try:
            return as_tensor(self.checkpoint, ours, self.dtype, self.device)
        finally:
            self.checkpoint.release_pages(ours)

    def rows(self, ours: str, rows: slice) -> Tensor:
        """Some rows of a matrix: (N, C)."""
        try:
            numbers = self.checkpoint.float32(ours, rows)
        finally:
            self.checkpoint.release_pages(ours)
        return torch.from_numpy(numbers).to(device=self.device, dtype=self.dtype)

    def linear(self, ours: str, h: Tensor) -> Tensor:
        """h · Wᵀ in blocks of the rows of a (V, C) matrix W: (…, C) -> (…, V), in h's dtype."""
        count = self.checkpoint.info(ours).shape[0]
        out = h.new_empty((*h.shape[:-1], count))  # (…, V)
        step = max(1, BLOCK_NUMBERS // h.shape[-1])
        for first in range(0, count, step):
            block = slice(first, min(first + step, count))
            out[..., block] = F.linear(h, self.rows(ours, block))  # (…, N)
        return out


class StreamedEmbedding(nn.Embedding):
    """An embedding that reads the rows of the given ids at each call."""

    def __init__(self, source: Source) -> None:
        config = source.checkpoint.config
        # An empty weight: a new KV cache reads its dtype and device.
        super().__init__(0, config.dim, device=source.device, dtype=source.dtype)
        self.source, self.vocab_size = source, config.vocab_size

    def forward(self, ids: Tensor) -> Tensor:
        asked = sorted(set(ids.flatten().tolist()))
        if not 0 <= asked[0] <= asked[-1] < self.vocab_size:
            bad = asked[0] if asked[0] < 0 else asked[-1]
            raise GenerationError(f"id {bad} is outside the vocabulary of {self.vocab_size}")
        read = [self.source.rows(EMBEDDINGS, slice(id, id + 1)) for id in asked]
        rows = torch.cat(read)  # (N, C)
        table = torch.tensor(asked, device=ids.device)  # (N,)
        where = torch.searchsorted(table, ids.contiguous())  # (B, T)
        return F.embedding(where, rows)  # (B, T, C)


class StreamedOutput(nn.Module):
    """The output matrix if it is not tied to the embeddings; a module, so that hooks work."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def forward(self, h: Tensor) -> Tensor:
        return self.source.linear(OUTPUT, h)  # (…, V)


class StreamedBlock(nn.Module):
    """Mixin for the class of a block: its weights are in memory during its forward pass."""

    source: Source
    number: int

    @contextmanager
    def filled(self) -> Iterator[StreamedBlock]:
        """Inside this `with` the weights have data."""
        if not next(self.parameters()).is_meta:  # filled by an outer `with`, which empties it
            yield self
            return
        shapes = dict(self.named_parameters())
        try:
            for name in shapes:
                set_parameter(self, name, self.source.tensor(f"layers.{self.number}.{name}"))
            yield self
        finally:
            for name, shape in shapes.items():
                set_parameter(self, name, shape)

    def forward(self, x: Tensor, step: ForwardContext) -> Tensor:
        with self.filled():
            out: Tensor = super().forward(x, step)  # (B, T, C)
            return out


class StreamedModel(LanguageModel):
    """Mixin for the class of a model: only the weights of the last norm stay in memory."""

    source: Source

    def multiply_output(self, h: Tensor) -> Tensor:
        if self.config.tie_embeddings:
            return self.source.linear(EMBEDDINGS, h)  # (…, V)
        return super().multiply_output(h)  # (…, V)


@cache
def streamed_class(mixin: Any, original: Any) -> Any:
    """A subclass of `original` whose methods are first searched in the mixin."""
    return type(f"Streamed{original.__name__}", (mixin, original), {})


def streamed_model(
    checkpoint: Checkpoint, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """A model that is used like any other; `layers[n].filled()` gives access to weights.

    `dtype` None leaves bfloat16 files as they are and makes everything else float32. The checkpoint
    stays open as long as the model is used. Raises ConfigError for a model that only runs whole in
    memory, and MemoryShortError before it allocates.
    """
    _ = checkpoint.layer_plan  # raises ConfigError if only PyTorch, in memory, runs the model
    dtype = default_dtype(checkpoint) if dtype is None else dtype
    source = Source(checkpoint, dtype, torch.device(device))
    if source.device.type == "cpu":
        require_memory(
            streamed_memory(checkpoint, 0, dtype.itemsize) - PYTORCH_ITSELF,
            what=f"one layer of {checkpoint.path.name} in {str(dtype).removeprefix('torch.')}",
            instead="close other programs, or use a smaller model",
        )
    with shapes_only():
        model: Any = checkpoint.architecture.model_class()(checkpoint.config).to(dtype)
    model.__class__ = streamed_class(StreamedModel, model.__class__)
    for n, block in enumerate(model.layers):
        block.__class__ = streamed_class(StreamedBlock, block.__class__)
        block.source, block.number = source, n
    model.tok_embeddings = StreamedEmbedding(source)
    set_parameter(model, "norm.weight", source.tensor("norm.weight"))
    model.source = source
    if not checkpoint.config.tie_embeddings:
        model.output = StreamedOutput(source)
    streamed: LanguageModel = model.requires_grad_(False).eval()
    return streamed


# --- a PyTorch model as an executor ---------------------------------------------------------------


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

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.capabilities = Capabilities(
            prefill_chunk=PREFILL_CHUNK, takes_rows=model.takes_embeddings
        )
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
                h = self._hidden(tokens, ids, cache.get(tokens.sequence))  # (T, C)
                if count := tokens.num_outputs:
                    logits[row : row + count] = self.model.logits(h[-count:]).cpu().numpy()
                row += count
        except BaseException:
            for tokens, length in zip(batch, before, strict=True):
                cache.rewind(tokens.sequence, length)
            raise
        return logits

    def _checked(self, tokens: NewTokens, cache: TorchCache) -> list[int]:
        """The new ids. Raises GenerationError if they cannot be fed to their sequence."""
        width = self.config.dim if self.model.takes_embeddings else 0  # type: ignore[attr-defined]
        return checked_tokens(tokens, cache.length(tokens.sequence), self.config, width)[0]

    def _hidden(self, tokens: NewTokens, ids: list[int], cache: KVCache) -> Tensor:
        """Hidden states (T, C) of the new tokens, which are added to the cache."""
        of_vocabulary = torch.tensor([[max(id, 0) for id in ids]], device=self.device)  # (1, T)
        if not tokens.rows and not tokens.prefix:
            return self.model.hidden(of_vocabulary, cache)[0]  # (T, C)
        x = self.model.embed(of_vocabulary)  # (1, T, C)
        for t, id in enumerate(ids):
            if id < 0:
                x[0, t] = torch.from_numpy(tokens.rows[id])
        model: Any = self.model
        hidden: Tensor = model.hidden(of_vocabulary, cache, embeddings=x, prefix=tokens.prefix)
        return hidden[0]
