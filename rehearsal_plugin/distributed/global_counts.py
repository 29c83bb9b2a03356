"""How many rows every rank holds of every partition, kept alike on all ranks by small headers.

A header is a fixed number of integers: fingerprint of the rows, step, rows asked for, number of pairs, notes of layers
above, then (key, count) pairs for the partitions whose count changed since the last header. What did not change does
not travel. A rank with more changes than pairs sends none and leaves that one draw out, but says how many pairs
it takes to tell all its counts; from the next step on, headers are that wide, on all ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import ExchangeError

__all__ = ["FIXED", "LEAST_PAIRS", "NOTES", "GlobalCounts"]

NOTES = 4  # integers that layers above may use as they like
FIXED = 4 + NOTES  # integers of a header before its pairs
FIRST_PAIRS = 64  # of the first header: as wide on a rank with another config, so that it can say so
LEAST_PAIRS = 8  # of later ones where rows are drawn by partition, unless more of these change in a step


class GlobalCounts:
    """The counts of all ranks.

    Args:
        rank: This rank.
        size: Ranks.
        fingerprint: Digest of the row layout and the seed, the same on all ranks.
        pairs: Changed counts that a header has room for at least, once all ranks have shown that they agree.
        first: The same of the first header.

    Attributes:
        keys: `[partitions]` int64, the partition key of each column.
        counts: `[size, partitions]` int64.
        notes: `[size, NOTES]` int64, what ranks noted in their last headers.
    """

    def __init__(self, rank: int, size: int, fingerprint: int, pairs: int, first: int = FIRST_PAIRS) -> None:
        self.keys = np.empty(0, dtype=np.int64)
        self.counts = np.zeros((size, 0), dtype=np.int64)
        self.notes = np.zeros((size, NOTES), dtype=np.int64)
        self._rank, self._size, self._fingerprint = rank, size, fingerprint
        self._least, self._pairs = pairs, first
        self._column: dict[int, int] = {}

    @property
    def words(self) -> int:
        """Integers of the next header."""
        return FIXED + 2 * self._pairs

    def header(
        self, step: int, request: int, keys: IntArray, sizes: IntArray, notes: Sequence[int] = (0,) * NOTES
    ) -> IntArray:
        """What this rank tells the others.

        Args:
            step: Number of the exchange.
            request: Rows that this rank asks for.
            keys: `[p]` int64, keys of its partitions.
            sizes: `[p]` int64, rows stored of each.
            notes: `NOTES` integers.

        Returns:
            `[FIXED + 2 * pairs]` int64.
        """
        told = np.zeros(len(keys), dtype=np.int64)
        known = [(i, self._column[key]) for i, key in enumerate(keys.tolist()) if key in self._column]
        if known:
            position, column = np.array(known).T
            told[position] = self.counts[self._rank, column]
        changed = np.flatnonzero(told != sizes)
        fits = len(changed) <= self._pairs
        # Whoever is left out is forgotten, and then has every count to tell.
        needed = len(changed) if fits else max(len(changed), int(np.count_nonzero(sizes)))
        header = np.zeros(self.words, dtype=np.int64)
        header[:FIXED] = self._fingerprint, step, request, needed, *notes
        if fits:
            header[FIXED : FIXED + 2 * needed] = np.stack((keys[changed], sizes[changed]), axis=1).ravel()
        return header

    def absorb(self, headers: IntArray) -> IntArray:
        """Take in the headers of all ranks.

        Args:
            headers: `[size, FIXED + 2 * pairs]` int64.

        Returns:
            `[size]` int64, the rows that each rank asks for.

        Raises:
            ExchangeError: Ranks are at different steps, or their rows differ in fields, dtypes or shapes.
        """
        self._check(headers)
        self.notes = headers[:, 4:FIXED].copy()
        changes = headers[:, 3]
        overflowing = np.flatnonzero(changes > self._pairs)
        pairs = headers[:, FIXED:].reshape(self._size, self._pairs, 2)
        rank, entry = np.nonzero(np.arange(self._pairs) < np.where(changes > self._pairs, 0, changes)[:, None])
        keys, sizes = pairs[rank, entry].T
        column = self._columns(keys)  # may widen the table
        self.counts[rank, column] = sizes
        self.counts[overflowing] = 0
        widest = 1 << int(changes.max() - 1).bit_length() if changes.max() else 1
        self._least = self._pairs = max(self._least, widest)
        return headers[:, 2]

    @property
    def digest(self) -> int:
        """A 32-bit number that follows from the counts of all ranks."""
        return zlib.crc32(self.counts.tobytes(), zlib.crc32(self.keys.tobytes()))

    def state_dict(self) -> dict[str, Any]:
        """What this rank knows of all ranks."""
        widths = {"pairs": self._pairs, "least": self._least}
        return {"keys": self.keys, "counts": self.counts, "notes": self.notes, **widths}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on a rank of as many.

        Raises:
            ValueError: Those were other ranks.
        """
        keys, counts = state["keys"], state["counts"]
        if counts.shape != (self._size, len(keys)):
            raise ValueError(f"counts of {counts.shape[0]} ranks for {self._size}")
        self.keys, self.counts, self.notes = keys.copy(), counts.copy(), state["notes"].copy()
        self._pairs, self._least = int(state["pairs"]), int(state["least"])
        self._column = {key: column for column, key in enumerate(keys.tolist())}

    def _columns(self, keys: IntArray) -> IntArray:
        """Columns `[n]` of keys `[n]`; new keys get new columns, in the same order on every rank."""
        listed = keys.tolist()
        fresh = sorted(set(listed).difference(self._column))
        if fresh:
            self._column |= {key: column for column, key in enumerate(fresh, len(self._column))}
            self.keys = np.concatenate((self.keys, np.array(fresh, dtype=np.int64)))
            self.counts = np.pad(self.counts, ((0, 0), (0, len(fresh))))
        return np.fromiter(map(self._column.__getitem__, listed), np.int64, len(listed))

    def _check(self, headers: IntArray) -> None:
        mine = headers[self._rank]
        for column, what, cure in (
            (
                0,
                "rows of other fields, dtypes or shapes, or another rehearsal.seed or sampling.weights",
                "give every rank batches of one form and the same config",
            ),
            (1, "another step", "call update() equally often on every rank"),
        ):
            others = np.flatnonzero(headers[:, column] != mine[column])
            if len(others):
                other = int(others[0])
                raise ExchangeError(
                    f"rank {self._rank} is at step {mine[1]}; rank {other}, at step {headers[other, 1]}, has {what}; "
                    f"{cure}"
                )
