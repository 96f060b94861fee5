"""A model's tensors as a table: where each is in a file, and how it lies there.

Models other than Llama have a table of rows (weights/gpt2.py, weights/bigram.py). `RemappedFile`
shows their files as all other files are: under our names, (out, in), every matrix on its own.
weights/save.py goes through the same rows the other way.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import WeightsError, listed
from glassllama.base.interfaces import TensorFile, TensorInfo
from glassllama.weights.tensor_map import require_fit


class Opened(NamedTuple):
    """A file under our names, its configuration, and notes on what the file holds besides."""

    file: RemappedFile
    config: Any
    notes: list[str]


class Row(NamedTuple):
    """One of our parameters, and where it is in theirs."""

    ours: str
    theirs: str
    shape: tuple[int, ...]  # of ours
    transposed: bool = False  # theirs is (in, out)
    part: int = 0  # which of the `parts` that theirs holds side by side
    parts: int = 1
    zero: bool = False  # theirs must be zeros, and is no parameter of ours

    @property
    def their_shape(self) -> tuple[int, ...]:
        out, *rest = self.shape
        whole = (self.parts * out, *rest)
        return whole[::-1] if self.transposed else whole


class RemappedFile:
    """A `TensorFile` under our names, over a file that these rows describe."""

    def __init__(
        self,
        file: TensorFile,
        rows: Sequence[Row],
        *,
        known: Collection[str] = (),
        ignored: Collection[re.Pattern[str]] = (),
    ) -> None:
        """Raises WeightsError that lists all that does not fit (see names.require_fit)."""
        wanted = {row.theirs: row.their_shape for row in rows}
        self.ignored = require_fit(file, wanted, known=known, ignored=ignored)
        if bad := [row.theirs for row in rows if row.zero and file.read(row.theirs).any()]:
            raise WeightsError(f"{listed(bad)}: not zero, but the configuration says no bias")
        self.file = file
        self.rows = {row.ours: row for row in rows if not row.zero}

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.file.metadata

    def names(self) -> list[str]:
        return list(self.rows)

    def info(self, name: str) -> TensorInfo:
        """Shape and size of ours; path and offset are those of the tensor that holds it."""
        row = self.rows[name]
        info = self.file.info(row.theirs)
        return TensorInfo(
            name=name,
            shape=row.shape,
            dtype=info.dtype,
            path=info.path,
            offset=info.offset,
            nbytes=info.nbytes // row.parts,
        )

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        row = self.rows[name]
        whole = self.file.read(row.theirs)
        mine = np.split(whole, row.parts, axis=-1)[row.part] if row.parts > 1 else whole
        mine = mine.T if row.transposed else mine
        return np.ascontiguousarray(mine if rows is None else mine[rows])

    def release_pages(self, name: str) -> None:
        self.file.release_pages(self.rows[name].theirs)

    def close(self) -> None:
        self.file.close()
