"""An undo log of a buffer: the rows that were overwritten since the last commit."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import numpy as np

from rehearsal_plugin.buffer.storage import RowStorage, StoredRows, parts_of
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["UndoLog"]


T = TypeVar("T")


class UndoLog(Generic[T]):
    """Takes a buffer back to the moment when the log was begun.

    Memory grows with the rows that are overwritten until the next commit, not with the rows stored.

    Args:
        storage: The rows.
        count: How many there are, from slot 0 on.
        records: Everything known of them besides their bytes; copied.
    """

    def __init__(self, storage: RowStorage, count: int, records: T) -> None:
        self._storage = storage
        self._records = copy.deepcopy(records)
        self._saved = np.zeros(count, dtype=bool)
        self._entries: list[tuple[IntArray, StoredRows]] = []

    def save_rows(self, slots: IntArray) -> None:
        """Save the rows at `slots` `[n]`, about to be overwritten, unless they are saved already or are new."""
        old = slots[slots < len(self._saved)]
        old = old[~self._saved[old]]
        if len(old):
            self._saved[old] = True
            self._entries.append((old, self._storage.copy(old)))

    def undo(self) -> T:
        """Write all saved rows back; returns a copy of the records of that time."""
        for slots, rows in self._entries:
            for part in parts_of(rows):
                self._storage.write(slots[part], rows[part])
        self._entries.clear()
        self._saved[:] = False
        return copy.deepcopy(self._records)
