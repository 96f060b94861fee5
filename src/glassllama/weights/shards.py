"""Meta's model-parallel shards, read as if the model had never been cut.

`consolidated.00.pth` … hold slices: a matrix that was split by output rows is joined along axis 0,
one split by input columns along axis 1, vectors are copies. Source: the parallel layers of Meta's
published model code (column-parallel wq wk wv w1 w3 output, row-parallel wo w2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import WeightsError, listed, quoted
from glassllama.base.interfaces import Progress, TensorFile, TensorInfo
from glassllama.formats.pth import open_pth

BY_ROWS = (".wq.weight", ".wk.weight", ".wv.weight", ".w1.weight", ".w3.weight", "output.weight")
BY_COLUMNS = (".wo.weight", ".w2.weight")


def open_meta(paths: Sequence[Path], dim: int) -> TensorFile:
    """One .pth, or all shards of a model whose width is `dim`. Raises FormatError."""
    files = [open_pth(path) for path in paths]
    return files[0] if len(files) == 1 else MergedShards(files, dim)


class MergedShards:
    """A TensorFile over slices: `read` joins them, a slice of rows touches what it needs."""

    def __init__(self, files: Sequence[Any], dim: int) -> None:
        self.files, self.dim = files, dim
        names = [set(file.names()) for file in files]
        if any(other != names[0] for other in names):
            apart = set.union(*names) - set.intersection(*names)
            raise WeightsError(f"shards hold different tensors: {listed(apart)}")

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.files[0].metadata  # type: ignore[no-any-return]

    def names(self) -> list[str]:
        return self.files[0].names()  # type: ignore[no-any-return]

    def axis(self, name: str) -> int | None:
        """Along which axis the slices of a tensor are joined; None where each is a full copy."""
        if name.endswith(BY_ROWS):
            return 0
        if name.endswith(BY_COLUMNS):
            return 1
        if name.startswith("tok_embeddings"):  # Llama 2 cut its width, Llama 3 its vocabulary
            return 0 if self.files[0].info(name).shape[-1] == self.dim else 1
        return None

    def info(self, name: str) -> TensorInfo:
        """The whole tensor's shape; path and offset are those of its first slice."""
        slices = [file.info(name) for file in self.files]
        first, axis = slices[0], self.axis(name)
        if len({s.dtype for s in slices}) > 1 or len({len(s.shape) for s in slices}) > 1:
            raise WeightsError(f"{name} differs in type or rank from shard to shard")
        if axis is None:
            return first  # type: ignore[no-any-return]
        across = {s.shape[:axis] + s.shape[axis + 1 :] for s in slices}
        if len(across) > 1:
            raise WeightsError(
                f"{name}: slices {quoted([s.shape for s in slices])} cannot be joined"
            )
        shape = list(first.shape)
        shape[axis] = sum(s.shape[axis] for s in slices)
        return TensorInfo(
            name=name,
            shape=tuple(shape),
            dtype=first.dtype,
            path=first.path,
            offset=first.offset,
            nbytes=sum(s.nbytes for s in slices),
        )

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        axis = self.axis(name)
        if axis is None:
            return self.files[0].read(name, rows)  # type: ignore[no-any-return]
        if axis == 1:
            return np.concatenate([file.read(name, rows) for file in self.files], axis=1)
        return self._rows(name, rows or slice(None))

    def _rows(self, name: str, rows: slice) -> NDArray[Any]:
        """Rows of a tensor cut by rows: from each slice the part that falls into it."""
        start, stop, _ = rows.indices(self.info(name).shape[0])
        parts, first = [], 0
        for file in self.files:
            count = file.info(name).shape[0]
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                parts.append(file.read(name, slice(low, high)))
            first += count
        return np.concatenate(parts) if parts else self.files[0].read(name, slice(0, 0))

    def release_pages(self, name: str) -> None:
        for file in self.files:
            file.release_pages(name)

    def verify(self, progress: Progress | None = None) -> None:
        """Check the checksums of every shard. Raises FormatError naming the damaged tensor."""
        for done, file in enumerate(self.files):
            file.verify()
            if progress is not None:
                progress(done + 1, len(self.files))

    def close(self) -> None:
        for file in self.files:
            file.close()
