"""Rows of a storage in memory that is used again and again."""

from __future__ import annotations

from torch import Tensor

from rehearsal_plugin.buffer.rows.staging import RowPool
from rehearsal_plugin.buffer.storage import RowStorage
from rehearsal_plugin.buffer.trimmed_storage import TrimmedStorage
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["RowReader"]


class RowReader:
    """Reads rows to two buffers in turn; rows of different length are padded again only where others were before.

    Args:
        storage: Of the rows.
        trimmed: The same, if its rows differ in length.
    """

    def __init__(self, storage: RowStorage, trimmed: TrimmedStorage | None = None) -> None:
        self._storage, self._trimmed = storage, trimmed
        self._pool = RowPool(storage.row_bytes, storage.device, None if trimmed is None else trimmed.blank)

    def read(self, slots: IntArray) -> Tensor:
        """The rows at `slots` `[n]` int64, `[n, row_bytes]` uint8, until the call after the next; not to be changed."""
        rows = self._pool.take(len(slots))
        if self._trimmed is not None:
            self._trimmed.read(slots, rows, self._pool.bounds[: len(slots)])
        elif len(slots):
            self._storage.read(slots, rows)
        return rows
