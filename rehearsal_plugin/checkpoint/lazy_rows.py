"""Packed rows that are read from their files on demand, so that they may exceed memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.dedup import content_hashes, repeated_rows, same_content
from rehearsal_plugin.buffer.rows.trimming import TrimmedRows
from rehearsal_plugin.buffer.storage import StoredRows
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["LazyRows"]

PART_BYTES = 4 << 20


class LazyRows:
    """A selection of packed rows from several sources, in any order, that are copied only when they are read.

    Args:
        sources: `[m, row_bytes]` uint8 each, such as the mapping of a file, trimmed or not.
        source: `[n]` int64, the source of each row.
        index: `[n]` int64, its index in that source.
    """

    def __init__(self, sources: Sequence[StoredRows], source: IntArray, index: IntArray) -> None:
        self._sources, self._source, self._index = tuple(sources), source, index

    @classmethod
    def of(cls, rows: StoredRows) -> LazyRows:
        """All rows of one source in their order."""
        return cls((rows,), np.zeros(len(rows), dtype=np.int64), np.arange(len(rows)))

    @classmethod
    def joined(cls, parts: Sequence[LazyRows]) -> LazyRows:
        """The rows of all parts, one after the other."""
        starts = np.cumsum([0, *(len(part._sources) for part in parts)])
        return cls(
            [rows for part in parts for rows in part._sources],
            np.concatenate([part._source + start for part, start in zip(parts, starts.tolist(), strict=False)]),
            np.concatenate([part._index for part in parts]),
        )

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as they lie in their sources."""
        total = 0
        for number, rows in enumerate(self._sources):
            index = self._index[self._source == number]
            total += rows.select(index).nbytes if isinstance(rows, TrimmedRows) else len(index) * rows.shape[1]
        return total

    @property
    def longest(self) -> int | None:
        """Positions of the longest row; None where their padding lies with them."""
        lengths = [rows.lengths for rows in self._sources if isinstance(rows, TrimmedRows)]
        if len(lengths) < len(self._sources):
            return None
        return max((int(each.max(initial=0)) for each in lengths), default=0)

    def select(self, index: IntArray) -> LazyRows:
        """The rows at `index` `[m]` int64."""
        return LazyRows(self._sources, self._source[index], self._index[index])

    def read_all(self) -> StoredRows:
        """All rows `[n, row_bytes]`; the source itself if they are just that, and trimmed if all sources are."""
        (first, *others) = self._sources
        trimmed = [rows for rows in self._sources if isinstance(rows, TrimmedRows)]
        if len(trimmed) == len(self._sources):
            starts = np.cumsum([0, *map(len, trimmed)])
            return TrimmedRows.joined(trimmed).select(starts[self._source] + self._index)
        if not others and np.array_equal(self._index, np.arange(len(first))):
            return first
        return self._read_rows(np.arange(len(self)))

    def read_parts(self) -> Iterator[Tensor]:
        """All rows, a few megabytes at a time."""
        count = self._at_once
        for start in range(0, len(self), count):
            yield self._read_rows(np.arange(start, min(start + count, len(self))))

    def distinct(self, content_bytes: int) -> IntArray:
        """Indices of the rows whose first `content_bytes` bytes equal no earlier row, `[m]` int64, ascending."""
        hashes = [content_hashes(rows, content_bytes) for rows in self.read_parts()]

        def rows_equal(first: IntArray, second: IntArray) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
            starts = range(0, len(first), self._at_once)
            spans = [slice(start, start + self._at_once) for start in starts]
            matches = [
                same_content(self._read_rows(first[span]), self._read_rows(second[span]), content_bytes)
                for span in spans
            ]
            return np.concatenate(matches) if matches else np.zeros(0, dtype=bool)

        return np.flatnonzero(~repeated_rows(np.concatenate(hashes), rows_equal)) if hashes else np.arange(0)

    @property
    def _at_once(self) -> int:
        return max(1, PART_BYTES // self._sources[0].shape[1])

    def _read_rows(self, rows: IntArray) -> Tensor:
        source, index = self._source[rows], self._index[rows]
        out = torch.empty((len(rows), self._sources[0].shape[1]), dtype=torch.uint8, device="cpu")
        for number in np.unique(source).tolist():
            positions = np.flatnonzero(source == number)
            out[torch.from_numpy(positions)] = self._sources[number][torch.from_numpy(index[positions])]
        return out
