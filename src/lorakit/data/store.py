"""Encoded rows in an Arrow file, mapped into memory: a million rows take none until they are used.

The file is what ``datasets`` writes and reads (an Arrow stream), with two columns of equal lists: ``ids``, the
tokens, and ``trained``, whether each carries loss. It does not depend on how many processes made it.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from lorakit.data.encode import Row
from lorakit.ops.loss import IGNORE

if TYPE_CHECKING:
    import pyarrow


def to_batch(rows: Sequence[Row]) -> pyarrow.RecordBatch:
    """Rows as one piece of the file."""
    import pyarrow

    ends = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int32)
    ids = np.fromiter(itertools.chain.from_iterable(row.ids for row in rows), np.int32, ends[-1])
    labels = np.fromiter(itertools.chain.from_iterable(row.labels for row in rows), np.int32, ends[-1])
    columns = [pyarrow.ListArray.from_arrays(ends, pyarrow.array(values)) for values in (ids, labels != IGNORE)]
    return pyarrow.RecordBatch.from_arrays(columns, names=["ids", "trained"])


class StoredRows(Sequence[Row]):
    """The rows of an Arrow file, each made when it is asked for."""

    def __init__(self, path: Path) -> None:
        from datasets import Dataset

        table = Dataset.from_file(str(path)).data.table
        self._ids = table.column("ids").chunks
        self._trained = table.column("trained").chunks
        self._starts = list(itertools.accumulate((len(chunk) for chunk in self._ids), initial=0))
        self.lengths: NDArray[np.int32] = np.concatenate(
            [np.diff(chunk.offsets.to_numpy()) for chunk in self._ids] or [np.zeros(0, np.int32)]
        )

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._row(number) for number in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])  # a range knows negative numbers, and what is out of range

    def __iter__(self) -> Iterator[Row]:
        return (self._row(number) for number in range(len(self)))

    def columns(self) -> Iterator[tuple[pyarrow.ListArray, pyarrow.ListArray]]:
        """The tokens, and whether each carries loss, piece by piece."""
        return zip(self._ids, self._trained, strict=True)

    def _row(self, number: int) -> Row:
        chunk = bisect.bisect_right(self._starts, number) - 1
        inside = number - self._starts[chunk]
        ids = self._ids[chunk][inside].values.to_pylist()
        trained = self._trained[chunk][inside].values.to_pylist()
        return Row(tuple(ids), tuple(i if t else IGNORE for i, t in zip(ids, trained, strict=True)))


def lengths_of(rows: Sequence[Row]) -> Sequence[int]:
    """The number of tokens of each row, without making the rows if they are stored."""
    return rows.lengths.tolist() if isinstance(rows, StoredRows) else [len(row.ids) for row in rows]


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """sha256 over every token and label, in order, however the rows are kept; stored ones are not made."""
    lengths, ids, trained = (hashlib.sha256() for _ in range(3))
    for tokens, carries in rows.columns() if isinstance(rows, StoredRows) else [to_batch(rows).columns]:
        lengths.update(np.diff(tokens.offsets.to_numpy()).tobytes())
        ids.update(tokens.flatten().to_numpy().tobytes())
        trained.update(carries.flatten().to_numpy(zero_copy_only=False).tobytes())
    return hashlib.sha256(b"".join(part.digest() for part in (lengths, ids, trained))).hexdigest()
