"""The interfaces between the parts: text ↔ ids, file → tensors, ids → logits.

    text → Tokenizer.encode → ids → Scheduler → Executor.forward → logits → Sampler → id → text
    path → open_checkpoint → config + tensors, one at a time → PyTorch model, or the engine

Letters for shapes, in the whole package: B batch, T new tokens, S visible tokens, C model width,
H query heads, K kv heads, D head width, F ffn width, V vocabulary, P image patches.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import GenerationError, quoted


class Tokenizer(Protocol):
    """Text ↔ ids. Special tokens are recognized in a text only if `specials=True`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos(self) -> int | None: ...  # None if the model uses none
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def specials(self) -> Mapping[str, int]: ...  # special tokens: text -> id
    @property
    def added(self) -> Mapping[str, int]: ...  # added tokens that are not special: text -> id
    @property
    def gaps(self) -> Sequence[int]: ...  # ids below vocab_size that have no token

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]: ...
    def encode_parts(self, parts: Sequence[str | int]) -> list[int]: ...  # texts, special ids
    def encode_array(self, text: str) -> NDArray[np.uint32]: ...  # for corpora
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...  # special tokens: their text
    def without_added(self, texts: Iterable[str]) -> Tokenizer: ...  # for which they are plain text


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Position of one tensor in its file. `shape` is in NumPy's order (row-major).

    `dtype` is F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL, or a GGUF block type such as Q4_1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: str  # the file that contains it, which may be one of several shards
    offset: int  # bytes from the start of that file
    nbytes: int


class TensorFile(Protocol):
    """A checkpoint's file or shards: named tensors, one at a time, memory-mapped."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def names(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """The elements as stored, of `shape` (or its `rows` along the first axis), read-only.

        Block types are returned as uint8 (rows, bytes per row); formats.blocks.dequantize converts
        them to float32. Only the bytes of these rows are read.
        """
        ...

    def release_pages(self, name: str) -> None:
        """Give the mapped pages of this tensor back to the system (they count as memory)."""
        ...

    def close(self) -> None: ...


class Progress(Protocol):
    """Callback that is called during long operations with the units done and their total."""

    def __call__(self, done: int, total: int) -> None: ...


CacheType = Literal["int16", "int8"]  # how an engine stores keys and values, if not as float32
CACHE_NUMBER: dict[CacheType, int] = {"int16": 2, "int8": 1}  # bytes
CACHE_SCALE = 4  # bytes of the scale of every head's key, and of its value


class ModelConfig(Protocol):
    """The configuration values that generation needs, for every architecture."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def unbounded(self) -> bool: ...  # True: the context is unlimited


class KVCache(Protocol):
    """Keys and values of any number of sequences, which can be added and removed at any time.

    It belongs to the executor that created it. A sequence is identified by the number that `add`
    returned.
    All methods raise GenerationError for a sequence that is not in the cache.
    """

    def add(self) -> int:
        """A new, empty sequence -> its number."""
        ...

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens -> its number."""
        ...

    def rewind(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence after the first `length`."""
        ...

    def remove(self, sequence: int) -> None: ...
    def length(self, sequence: int) -> int: ...

    def reused(self, sequence: int) -> int:
        """The number of its tokens that were reused from another sequence and not computed."""
        ...


Output = Literal["last", "all", "none"]


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The new ids of one sequence, and for which of them logits are returned.

    A negative id stands for one of `rows`, a vector (C,) float32 that is used instead of an
    embedding, such as a part of an image. Keys and values are shared by ids, so equal negative ids
    must have equal vectors: `row_ids` makes them from the content. With `prefix` the ids are the
    beginning of their sequence and all see each other.
    """

    sequence: int
    ids: Sequence[int]
    output: Output = "last"
    rows: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    prefix: bool = False

    @property
    def num_outputs(self) -> int:
        if self.output == "all":
            return len(self.ids)
        return int(self.output == "last")


TokenBatch = Sequence[NewTokens]  # of different sequences of one cache; each has at least one id


class NativeSampler(Protocol):
    """Penalties, temperature, filters and the draw in one call."""

    def __call__(
        self,
        logits: NDArray[np.float32],
        seen: NDArray[np.bool_],
        counts: NDArray[np.int32],
        uniform: float,
    ) -> int:
        """The id, or -1 if no id can be chosen.

        All arrays are (V,). `seen`: whether the prompt or the answer contains an id; `counts`: how
        often the answer contains it; `uniform` is a random number in [0, 1).
        """
        ...


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an executor supports besides `forward`, and the chunk size it works best with."""

    prefill_chunk: int  # new tokens per pass: large enough to be fast, small enough for Ctrl-C
    # The logits of a sequence are bit-identical for every division of its ids into passes and for
    # every other content of the batch. If False, generation runs one sequence at a time.
    batch_invariant: bool = False
    shares_prefixes: bool = False  # sequences with the same beginning share its keys and values
    takes_rows: bool = False  # `NewTokens.rows` and `prefix`
    native_sampler: Callable[..., NativeSampler] | None = None  # see native/engine/sampling.py


class Executor(Protocol):
    """Runs a model: the engine, or a PyTorch model (weights/load.py). Generation calls it."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def notes(self) -> list[str]:
        """Notices for the user, one line each."""
        ...

    def new_cache(self) -> KVCache: ...

    def forward(self, batch: TokenBatch, cache: KVCache) -> NDArray[np.float32]:
        """Append new tokens to sequences -> (rows, V) float32 logits, in the order of the batch.

        The rows of a sequence are those that its `output` selects. Raises GenerationError if an id
        is outside the vocabulary, a sequence would exceed the context, or the cache belongs to
        another executor. After any exception, including KeyboardInterrupt, the cache is unchanged.
        """
        ...

    def close(self) -> None:
        """End the threads, which nothing else ends. Later calls raise GenerationError."""
        ...


CLOSED = "the model is closed: load it again"
FOREIGN_CACHE = "a cache of another executor: make one with this executor's new_cache"


def context_full(length: int, context: int) -> GenerationError:
    """The error for a sequence that would have `length` tokens."""
    return GenerationError(
        f"context full: {length} tokens are more than the model's context of {context}; shorten "
        "the text, or give it in parts"
    )


def row_ids(content: bytes, count: int) -> list[int]:
    """Negative ids for `count` rows that follow from this content."""
    first = int.from_bytes(hashlib.sha256(content).digest()[:16], "big") << 32
    return [-first - n - 1 for n in range(count)]


def checked_ids(
    what: str, given: Iterable[object], vocab_size: int, rows: Collection[int] = ()
) -> list[int]:
    """Ids as Python integers.

    Raises GenerationError, which names `what`, if there are none, or if one is not an integer or is
    neither in the vocabulary nor in `rows`.
    """
    ids: list[int] = []
    for position, id in enumerate(given):
        try:
            if isinstance(id, bool):
                raise TypeError
            ids.append(operator.index(id))  # type: ignore[arg-type]
        except TypeError:
            raise GenerationError(
                f"{what}: {quoted(id)} at position {position} is no id (a whole number)"
            ) from None
        if not 0 <= ids[-1] < vocab_size and ids[-1] not in rows:
            raise GenerationError(
                f"{what}: id {quoted(ids[-1])} at position {position} is outside the vocabulary "
                f"0 … {vocab_size - 1}"
            )
    if not ids:
        raise GenerationError(
            f"{what} is empty: expected at least one id, such as the beginning-of-text id"
        )
    return ids


def checked_tokens(
    tokens: NewTokens, past: int, config: ModelConfig, width: int
) -> tuple[list[int], dict[int, NDArray[np.float32]]]:
    """The ids of `tokens`, and their rows, for a sequence of `past` tokens.

    `width` is C; 0: the model takes no rows and no prefix. Raises GenerationError.
    """
    if (tokens.rows or tokens.prefix) and not width:
        raise GenerationError("this model reads ids only: neither rows of images nor a prefix")
    if tokens.prefix and past:
        raise GenerationError(f"a prefix begins a sequence, this one has {past} tokens already")
    ids = checked_ids("new tokens", tokens.ids, config.vocab_size, tokens.rows.keys())
    rows = {id: tokens.rows[id] for id in ids if id in tokens.rows}
    for id, row in rows.items():
        fits = isinstance(row, np.ndarray) and row.shape == (width,) and row.dtype == np.float32
        if id >= 0 or not fits or not np.isfinite(row).all():
            raise GenerationError(
                f"row {id}: expected a negative id and {width} finite float32 numbers, got "
                f"{getattr(row, 'shape', type(row).__name__)} {getattr(row, 'dtype', '')}"
            )
    if past + len(ids) > config.max_seq_len and not config.unbounded:
        raise context_full(past + len(ids), config.max_seq_len)
    return ids, rows


def require_distinct(batch: TokenBatch) -> None:
    """Raise GenerationError if a sequence occurs twice."""
    if len({tokens.sequence for tokens in batch}) < len(batch):
        raise GenerationError("a sequence occurs twice in one batch: expected once")


def logits_of_text(executor: Executor, ids: Sequence[int]) -> NDArray[np.float32]:
    """(T,) ids -> (T, V) logits after each of them, computed with a new cache."""
    cache = executor.new_cache()
    return executor.forward([NewTokens(cache.add(), ids, "all")], cache)
