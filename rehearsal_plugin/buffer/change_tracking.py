"""Slots that were written lately, for each reader: incremental checkpoints, and the vector index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.rows.fields import Field, pick_rows
from rehearsal_plugin.buffer.storage import RowStorage
from rehearsal_plugin.buffer.trimmed_storage import TrimmedStorage
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["Changes", "TrackedStorage"]


class Changes:
    """Slots that were written since the last `take`, for one reader; all slots, at first.

    Args:
        capacity: Slots.
    """

    def __init__(self, capacity: int) -> None:
        self._changed = np.ones(capacity, dtype=bool)

    def note(self, slots: IntArray) -> None:
        """Count `slots` `[n]` as written."""
        self._changed[slots] = True

    def take(self, count: int) -> IntArray:
        """Which of the first `count` slots were written since the last call, `[n]` int64 in ascending order."""
        changed = np.flatnonzero(self._changed[:count])
        self._changed[:] = False
        return changed


class TrackedStorage:
    """Rows of another storage, whose writes are noted for every reader.

    | call | thread |
    |---|---|
    | `write`, `write_fields` | background; training while the buffer is filled or rolled back |
    | `read`, `first`, `copy` | either |
    | `follow`, `unfollow` | training, also while the background writes: it replaces the tuple of readers as a whole |
    | `take_changed`, `Changes.take` | wherever no row is being written, as a write in between would be lost |

    Args:
        storage: The rows.
        capacity: How many they are.

    Attributes:
        trimmed: The storage, if it is one of rows of different length.
    """

    def __init__(self, storage: RowStorage, capacity: int) -> None:
        self._storage, self._capacity = storage, capacity
        self.trimmed = storage if isinstance(storage, TrimmedStorage) else None
        self.device, self.row_bytes = storage.device, storage.row_bytes
        self.read, self.first, self.copy = storage.read, storage.first, storage.copy
        self._own: Changes | None = None  # until the first `take_changed`
        self._followers: tuple[Changes, ...] = ()  # replaced as a whole: another thread may be writing

    def write(
        self, slots: IntArray, rows: Tensor, places: IntArray | None = None, bounds: IntArray | None = None
    ) -> None:
        """See `RowStorage.write`; `bounds` are for a `TrimmedStorage`, and others are not given them."""
        if self.trimmed is None:
            self._storage.write(slots, rows, places)
        else:
            self.trimmed.write(slots, rows, places, bounds)
        self._note_changes(slots)

    def write_kept(self, slots: IntArray, rows: Tensor, places: IntArray | None, bounds: IntArray | None) -> None:
        """The same of rows on any device: only those at `places` have to travel."""
        if rows.device != self.device:
            rows = pick_rows(rows, places).to(self.device)
            bounds = bounds if bounds is None or places is None else bounds[places]
            places = None
        self.write(slots, rows, places, bounds)

    def write_fields(
        self, slots: IntArray, fields: Sequence[Field], columns: Sequence[Tensor], places: IntArray | None = None
    ) -> None:
        """See `RowStorage.write_fields`."""
        self._storage.write_fields(slots, fields, columns, places)
        self._note_changes(slots)

    def _note_changes(self, slots: IntArray) -> None:
        for changes in self._followers:
            changes.note(slots)

    def take_changed(self, count: int) -> IntArray:
        """Which of the first `count` slots were written since the last call, `[n]` int64 in ascending order."""
        self._own = self._own or self.follow()
        return self._own.take(count)

    def follow(self) -> Changes:
        """A record of the slots that are written from now on; until the first `take`, all slots count as written."""
        changes = Changes(self._capacity)
        self._followers = (*self._followers, changes)
        return changes

    def unfollow(self, changes: Changes) -> None:
        """Give up this record."""
        self._followers = tuple(kept for kept in self._followers if kept is not changes)
