"""Rows of a storage in memory that is used again and again."""

from __future__ import annotations

from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.narrowing import cut
from rehearsal_plugin.buffer.rows.staging import RowPool
from rehearsal_plugin.buffer.rows.trimming import RowTrimmer
from rehearsal_plugin.buffer.storage import RowStorage
from rehearsal_plugin.buffer.trimmed_storage import TrimmedStorage
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["RowReader"]


class RowReader:
    """Reads rows to two buffers in turn; rows of different length are padded again only where others were before.

    Args:
        storage: Of the rows.
        trimmed: The same, if its rows differ in length.
        layout: That of the rows.
        packed: How they are packed, see `narrowing`; None for as they are stored.
    """

    def __init__(
        self,
        storage: RowStorage,
        trimmed: TrimmedStorage | None,
        layout: RowLayout,
        packed: RowLayout | None = None,
    ) -> None:
        self._storage, self._trimmed, self._layout, self._packed = storage, trimmed, layout, packed
        row_bytes, blank = storage.row_bytes, None
        if trimmed is not None:
            self._trimmer = trimmed.trimmer if packed is None else RowTrimmer(packed)
            row_bytes, blank = self._trimmer.row_bytes, self._trimmer.blank
        self._pool = RowPool(row_bytes, storage.device, blank)

    def read(self, slots: IntArray) -> Tensor:
        """The rows at `slots` `[n]` int64, `[n, row_bytes]` uint8, until the call after the next; not to be changed.

        Raises:
            ValueError: One has more positions than they are packed with.
        """
        rows = self._pool.take(len(slots))
        if self._trimmed is not None:
            self._trimmed.read(slots, rows, self._pool.bounds[: len(slots)], self._trimmer)
            return rows
        if len(slots):
            self._storage.read(slots, rows)
        return rows if self._packed is None else cut(rows, self._layout, self._packed)
