"""The interfaces that carry the flow: text ↔ ids, file → tensors, ids → logits.

    text → Tokenizer.encode → ids → Executor.next_logits → sampler → id → StreamDecoder → text
    path → open_checkpoint → one tensor at a time → LlamaConfig + weights → torch model or engine

Letters for shapes, in the whole package: B batch, T new tokens, S visible tokens, C model width,
H query heads, K kv heads, D head width, F ffn width, V vocabulary, P image patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import GenerationError, quoted


class Tokenizer(Protocol):
    """Text ↔ ids. Control tokens are only ever read from text when `specials=True`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos(self) -> int | None: ...  # None where the model wants none
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def specials(self) -> Mapping[str, int]: ...  # control tokens: text -> id
    @property
    def gaps(self) -> Sequence[int]: ...  # ids below vocab_size that have no token

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]: ...
    def encode_array(self, text: str) -> NDArray[np.uint32]: ...  # for corpora
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...  # control tokens: their text


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies. `shape` is in numpy's order (last index runs fastest).

    `dtype` is F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL, or a GGUF block type such as Q4_1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: str  # the file that holds it: a shard of many, perhaps
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

        Block types come as uint8 (rows, bytes of a row); formats.blocks.dequantize makes float32.
        Touches these rows' bytes only.
        """
        ...

    def release_pages(self, name: str) -> None:
        """Give the mapped pages of this tensor back to the system (they count as memory)."""
        ...

    def close(self) -> None: ...


class Progress(Protocol):
    """Told how far a long piece of work has come, in units of its own choosing."""

    def __call__(self, done: int, total: int) -> None: ...


CacheType = Literal["int16", "int8"]  # how an engine keeps keys and values, if not exact
CACHE_NUMBER: dict[CacheType, int] = {"int16": 2, "int8": 1}  # bytes
CACHE_SCALE = 4  # bytes beside every head's key, and beside its value


class Cache(Protocol):
    """Keys and values of the tokens already seen, row by row; made by an executor for itself."""

    @property
    def max_len(self) -> int: ...
    @property
    def lengths(self) -> list[int]: ...  # tokens seen, per row

    def truncate(self, row: int, length: int) -> None: ...  # forget all after `length` tokens


FOREIGN_CACHE = "a cache of another executor: make one with this executor's new_cache"


def require_cache_size(config: LlamaConfig, batch: int, max_len: int) -> None:
    """Raise GenerationError for a cache of no rows or tokens, or of more than the context holds."""
    for name, value in (("batch", batch), ("max_len", max_len)):
        if type(value) is not int or value < 1:
            raise GenerationError(
                f"a cache's {name} must be a whole number from 1, got {quoted(value)}"
            )
    if max_len > config.max_seq_len and not config.unbounded:
        raise GenerationError(
            f"{max_len} tokens are more than the model's context of {config.max_seq_len}: "
            "shorten the text, or give it in parts"
        )


class Executor(Protocol):
    """What generation drives: the engine, or a torch model wrapped by weights/load.py."""

    @property
    def config(self) -> LlamaConfig: ...

    def new_cache(self, batch: int, max_len: int) -> Cache:
        """An empty cache. Raises GenerationError if `max_len` is more than the context."""
        ...

    def next_logits(self, ids: Sequence[Sequence[int]], cache: Cache) -> NDArray[np.float32]:
        """Feed each row its new ids (as many as it has) -> (B, V) logits after each row's last.

        A row with no new ids is left as it is, and its logits are not defined. Raises
        GenerationError, and leaves the cache as it was, where ids are not of the vocabulary, the
        cache has no room for them, or is another executor's.
        """
        ...

    def all_logits(self, ids: Sequence[int], cache: Cache) -> NDArray[np.float32]:
        """Feed one row -> (T, V) logits after every one of its new ids."""
        ...
