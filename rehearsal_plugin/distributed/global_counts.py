"""How many rows every rank holds of every partition, kept alike on all ranks by small headers.

A header tells the counts that changed since the last one; the others do not travel. With room for two pairs, three
steps of a rank that holds rows of the partitions 7, 8 and 9::

    stored          known before     pairs sent     CHANGES
    7:2             -                7:2            1
    7:2 8:1         7:2              8:1            1
    7:1 8:2 9:1     7:2 8:1          (none)         3     too many: left out of this draw, on all ranks
    7:1 8:2 9:1     -                7:1 8:2 9:1    3     headers have room for 4 pairs from here on

Invariant: the table says of a rank either all that it holds, or nothing. So no row is ever asked for that is not there.

With `sampling.weights: stream` ranks also tell how many rows they were offered of each partition that they hold. Then
two pairs tell one change: key and rows stored, rows offered and a zero.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import Headers, Word

__all__ = ["GlobalCounts", "counts_partitions", "least_pairs"]

FIRST_PAIRS = 64  # of the first header: as wide on a rank with another config, so that it can say so
LEAST_CHANGES = 8  # of later ones where rows are drawn by partition, unless more of these change in a step


def counts_partitions(config: RehearsalConfig) -> bool:
    """Whether ranks tell each other the rows of each partition, and not only of all."""
    sampling = config.sampling
    return sampling.by_partition or (sampling.weights == "stream" and config.buffer.sample_of == "partition")


def least_pairs(config: RehearsalConfig) -> int:
    """Changed counts that a header has room for at least, once all ranks have shown that they agree."""
    pairs_a_change = 2 if config.sampling.weights == "stream" else 1
    return pairs_a_change * (LEAST_CHANGES if counts_partitions(config) else 1)


class GlobalCounts:
    """The counts of all ranks.

    Args:
        rank: This rank.
        size: Ranks.
        pairs: See `least_pairs`.
        first: The same of the first header.
        with_offers: Whether ranks also tell how many rows they were offered.

    Attributes:
        keys: `[partitions]` int64, the partition key of each column.
        counts: `[size, partitions]` int64.
        offers: `[size, partitions]` int64, rows offered so far; empty without `with_offers`.
    """

    def __init__(
        self, rank: int, size: int, pairs: int, first: int = FIRST_PAIRS, *, with_offers: bool = False
    ) -> None:
        self.keys = np.empty(0, dtype=np.int64)
        self.counts = np.zeros((size, 0), dtype=np.int64)
        self.offers = self.counts.copy()
        self._pairs_a_change = 2 if with_offers else 1
        self._rank, self._size = rank, size
        self._least, self._room = pairs, first
        self._column: dict[int, int] = {}
        self._own_keys = self._own_columns = np.empty(0, dtype=np.int64)  # of this rank's partitions
        self._untold = np.empty(0, dtype=np.int64)  # numbers of those that had a row and no column

    @property
    def room(self) -> int:
        """Pairs that the next header has room for."""
        return self._room

    def changes(self, keys: IntArray, sizes: IntArray, offered: IntArray | None = None) -> tuple[int, IntArray]:
        """What this rank has to tell the others.

        Args:
            keys: `[p]` int64, keys of its partitions.
            sizes: `[p]` int64, rows stored of each.
            offered: `[p]` int64, rows offered so far of each; None where that is not told.

        Returns:
            How many pairs it takes, and the pairs `[n, 2]` int64 of key and rows; none where there is no room.
        """
        columns, each = self._columns_of_own(keys, sizes), self._pairs_a_change
        is_changed = self._known(self.counts, columns) != sizes
        told = [keys, sizes]
        if offered is not None:
            offered = np.where(sizes > 0, offered, 0)  # a partition without a row is told to nobody
            is_changed |= self._known(self.offers, columns) != offered
            told += [offered, np.zeros_like(offered)]
        changed = np.flatnonzero(is_changed)
        if each * len(changed) <= self._room:
            return each * len(changed), np.stack([words[changed] for words in told], axis=1).reshape(-1, 2)
        # A rank that is left out is forgotten, and then has every count to tell.
        return each * max(len(changed), int(np.count_nonzero(sizes))), np.empty((0, 2), dtype=np.int64)

    def absorb(self, headers: Headers) -> None:
        """Take in the headers of all ranks, and widen the next ones where a rank needs more room."""
        changes, each = headers.of(Word.CHANGES), self._pairs_a_change
        overflowing = changes > self._room
        entries = headers.pairs.reshape(self._size, -1, 2 * each)
        rank, entry = np.nonzero(np.arange(entries.shape[1]) < np.where(overflowing, 0, changes // each)[:, None])
        words = entries[rank, entry].T
        column = self._columns(words[0])  # may widen the tables
        self.counts[rank, column] = words[1]
        self.counts[np.flatnonzero(overflowing)] = 0
        if each == 2:
            self.offers[rank, column] = words[2]
        widest = 1 << int(changes.max() - 1).bit_length() if changes.max() else 1
        self._least = self._room = max(self._least, widest)

    @property
    def digest(self) -> int:
        """A 32-bit number that follows from the counts of all ranks."""
        offers = zlib.crc32(self.offers.tobytes())
        return zlib.crc32(self.counts.tobytes(), zlib.crc32(self.keys.tobytes(), offers))

    def state_dict(self) -> dict[str, Any]:
        """What this rank knows of all ranks."""
        offers = {"offers": self.offers} if self._pairs_a_change == 2 else {}
        return {"keys": self.keys, "counts": self.counts, "pairs": self._room, "least": self._least, **offers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on a rank of as many.

        Raises:
            ValueError: Those were other ranks.
        """
        keys, counts = state["keys"], state["counts"]
        if counts.shape != (self._size, len(keys)):
            raise ValueError(f"counts of {counts.shape[0]} ranks for {self._size}")
        self.keys, self.counts = keys.copy(), counts.copy()
        if self._pairs_a_change == 2:
            self.offers = state["offers"].copy()
        self._room, self._least = int(state["pairs"]), int(state["least"])
        self._column = {key: column for column, key in enumerate(keys.tolist())}
        self._own_keys = self._own_columns = self._untold = np.empty(0, dtype=np.int64)

    def _known(self, table: IntArray, columns: IntArray) -> IntArray:
        """This rank's entries `[p]` of a table at `columns` `[p]`, 0 where the others do not know of the partition."""
        known, is_told = np.zeros(len(columns), dtype=np.int64), columns >= 0
        known[is_told] = table[self._rank, columns[is_told]]
        return known

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
            if self._pairs_a_change == 2:
                self.offers = np.pad(self.offers, ((0, 0), (0, len(fresh))))
        return np.fromiter(map(self._column.__getitem__, listed), np.int64, len(listed))
