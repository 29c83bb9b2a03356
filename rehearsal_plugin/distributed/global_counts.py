"""How many rows every rank holds of every partition, kept alike on all ranks by small headers.

A header tells the counts that changed since the last one; the others do not travel. With room for two pairs, three
steps of a rank that holds rows of the partitions 7, 8 and 9::

    stored          known before     pairs sent     CHANGES
    7:2             -                7:2            1
    7:2 8:1         7:2              8:1            1
    7:1 8:2 9:1     7:2 8:1          (none)         3     too many: left out of this draw, on all ranks
    7:1 8:2 9:1     -                7:1 8:2 9:1    3     headers have room for 4 pairs from here on

Invariant: the table says of a rank either all that it holds, or nothing. So no row is ever asked for that is not there.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import Headers, Word

__all__ = ["LEAST_PAIRS", "GlobalCounts"]

FIRST_PAIRS = 64  # of the first header: as wide on a rank with another config, so that it can say so
LEAST_PAIRS = 8  # of later ones where rows are drawn by partition, unless more of these change in a step


class GlobalCounts:
    """The counts of all ranks.

    Args:
        rank: This rank.
        size: Ranks.
        pairs: Changed counts that a header has room for at least, once all ranks have shown that they agree.
        first: The same of the first header.

    Attributes:
        keys: `[partitions]` int64, the partition key of each column.
        counts: `[size, partitions]` int64.
    """

    def __init__(self, rank: int, size: int, pairs: int, first: int = FIRST_PAIRS) -> None:
        self.keys = np.empty(0, dtype=np.int64)
        self.counts = np.zeros((size, 0), dtype=np.int64)
        self._rank, self._size = rank, size
        self._least, self._room = pairs, first
        self._column: dict[int, int] = {}
        self._own_keys = self._own_columns = np.empty(0, dtype=np.int64)  # of this rank's partitions
        self._untold = np.empty(0, dtype=np.int64)  # numbers of those that had a row and no column

    @property
    def room(self) -> int:
        """Pairs that the next header has room for."""
        return self._room

    def changes(self, keys: IntArray, sizes: IntArray) -> tuple[int, IntArray]:
        """What this rank has to tell the others.

        Args:
            keys: `[p]` int64, keys of its partitions.
            sizes: `[p]` int64, rows stored of each.

        Returns:
            How many pairs it takes, and the pairs `[n, 2]` int64 of key and rows; none where there is no room.
        """
        columns = self._columns_of_own(keys, sizes)
        known = np.zeros(len(keys), dtype=np.int64)
        seen = columns >= 0
        known[seen] = self.counts[self._rank, columns[seen]]
        changed = np.flatnonzero(known != sizes)
        if len(changed) <= self._room:
            return len(changed), np.stack((keys[changed], sizes[changed]), axis=1)
        # A rank that is left out is forgotten, and then has every count to tell.
        return max(len(changed), int(np.count_nonzero(sizes))), np.empty((0, 2), dtype=np.int64)

    def absorb(self, headers: Headers) -> None:
        """Take in the headers of all ranks, and widen the next ones where a rank needs more room."""
        changes, pairs = headers.of(Word.CHANGES), headers.pairs
        overflowing = changes > self._room
        rank, entry = np.nonzero(np.arange(self._room) < np.where(overflowing, 0, changes)[:, None])
        keys, sizes = pairs[rank, entry].T
        column = self._columns(keys)  # may widen the table
        self.counts[rank, column] = sizes
        self.counts[np.flatnonzero(overflowing)] = 0
        widest = 1 << int(changes.max() - 1).bit_length() if changes.max() else 1
        self._least = self._room = max(self._least, widest)

    @property
    def digest(self) -> int:
        """A 32-bit number that follows from the counts of all ranks."""
        return zlib.crc32(self.counts.tobytes(), zlib.crc32(self.keys.tobytes()))

    def state_dict(self) -> dict[str, Any]:
        """What this rank knows of all ranks."""
        return {"keys": self.keys, "counts": self.counts, "pairs": self._room, "least": self._least}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on a rank of as many.

        Raises:
            ValueError: Those were other ranks.
        """
        keys, counts = state["keys"], state["counts"]
        if counts.shape != (self._size, len(keys)):
            raise ValueError(f"counts of {counts.shape[0]} ranks for {self._size}")
        self.keys, self.counts = keys.copy(), counts.copy()
        self._room, self._least = int(state["pairs"]), int(state["least"])
        self._column = {key: column for column, key in enumerate(keys.tolist())}
        self._own_keys = self._own_columns = self._untold = np.empty(0, dtype=np.int64)

    def _columns_of_own(self, keys: IntArray, sizes: IntArray) -> IntArray:
        """Columns `[p]` of this rank's partitions `[p]`, -1 where no header had them yet.

        A rank's partitions keep their order and new ones come behind them, so few are looked up: those that have a row,
        or had one the last time, as an empty one is told to nobody.
        """
        known = len(self._own_keys)
        if not np.array_equal(self._own_keys, keys[:known]):  # the buffer was rolled back
            self._own_columns, self._untold = self._own_columns[:0], self._untold[:0]
        columns = np.full(len(keys), -1)
        columns[: len(self._own_columns)] = self._own_columns
        missing = np.union1d(np.flatnonzero((columns < 0) & (sizes != 0)), self._untold)
        columns[missing] = [self._column.get(key, -1) for key in keys[missing].tolist()]
        self._own_keys, self._own_columns, self._untold = keys, columns, missing[columns[missing] < 0]
        return columns

    def _columns(self, keys: IntArray) -> IntArray:
        """Columns `[n]` of keys `[n]`; new keys get new columns, in the same order on every rank."""
        listed = keys.tolist()
        fresh = sorted(set(listed).difference(self._column))
        if fresh:
            self._column |= {key: column for column, key in enumerate(fresh, len(self._column))}
            self.keys = np.concatenate((self.keys, np.array(fresh, dtype=np.int64)))
            self.counts = np.pad(self.counts, ((0, 0), (0, len(fresh))))
        return np.fromiter(map(self._column.__getitem__, listed), np.int64, len(listed))
