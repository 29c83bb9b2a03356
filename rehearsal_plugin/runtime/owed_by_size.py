"""Rows or tokens that are owed to the model, apart for micro-batches of different size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rehearsal_plugin.core.exact_sum import ExactSum

__all__ = ["FORGOTTEN_AFTER", "OwedBySize"]

FORGOTTEN_AFTER = 256
"""Micro-batches after which a size that does not come any more is owed nothing: the next one inherits it."""

ANY_SIZE = -1
"""The size of micro-batches that were not noted, as in checkpoints of earlier releases."""


class OwedBySize:
    """A sum for each size of micro-batches; sizes that differ by half at most count as one.

    What a micro-batch of 64 rows did not get is owed to others of its size. If it were owed to all, single rows beside
    them would be displaced far more often than the ratio says (`mode: replace`). For example, with a ratio of 1/4::

        rows        64    1     1     1     1     64
        due         16    1/4   1/4   1/4   1/4   16
        gets        10    0     0     0     1     22
        owed to 64  6     6     6     6     6     0
        owed to 1   0     1/4   2/4   3/4   0     0

    A size is named by the rows of the first micro-batch that had it.
    """

    def __init__(self) -> None:
        self._sums: dict[int, ExactSum] = {}
        self._last: dict[int, int] = {}  # number of the last micro-batch of each size
        self._count = 0

    @property
    def several(self) -> bool:
        """Whether there are several sizes."""
        return len(self._sums) > 1

    def to(self, rows: int) -> ExactSum:
        """The sum of micro-batches of so many `rows`."""
        return self._sums[self._size_of(rows)]

    def note_micro_batch(self, rows: int) -> None:
        """A micro-batch came: it inherits from sizes that do not come any more."""
        self._count += 1
        size = self._size_of(rows)
        self._last[size] = self._count
        if not self.several:
            return
        for gone in [gone for gone, last in self._last.items() if last + FORGOTTEN_AFTER < self._count]:
            self._sums[size].add(self._sums.pop(gone).ratio)
            del self._last[gone]

    def total(self) -> ExactSum:
        """The sum of all sizes."""
        total = ExactSum()
        for owed in self._sums.values():
            total.add(owed.ratio)
        return total

    def write_off(self, amount: int) -> None:
        """So much is owed no more; it is taken from the size that is owed most."""
        sums = self._sums.values()
        most = max(sums, key=lambda owed: owed.numerator / owed.denominator) if sums else self.to(ANY_SIZE)
        most.add((-amount, 1))

    def pass_on(self, rows: int, amount: int) -> bool:
        """Let the largest be owed what micro-batches of `rows` have no room for; False, and nobody is, if they are."""
        size, largest = self._size_of(rows), max(self._sums)
        self._sums[size].add((-amount, 1))
        if size != largest:
            self._sums[largest].add((amount, 1))
        return size != largest

    def state(self) -> list[list[int]]:
        """Size, numerator, denominator, and micro-batches since the last one, of every size."""
        return [[size, *owed.reduced, self._count - self._last[size]] for size, owed in self._sums.items()]

    @classmethod
    def load(cls, state: Iterable[Sequence[int]]) -> OwedBySize:
        """What `state` gave."""
        loaded = cls()
        for size, numerator, denominator, since in state:
            loaded._sums[size] = ExactSum((numerator, denominator))
            loaded._last[size] = -since
        return loaded

    @classmethod
    def of_earlier_release(cls, owed: Sequence[int]) -> OwedBySize:
        """One sum of all sizes, which is that of the first micro-batch to come."""
        return cls.load([[ANY_SIZE, *owed, 0]])

    def _size_of(self, rows: int) -> int:
        """The size of micro-batches of so many `rows`; a new one begins with nothing owed."""
        if rows in self._sums:
            return rows
        if not rows and self._sums:
            return next(iter(self._sums))  # nothing is due for it
        for size in self._sums:
            if 2 * max(size, rows) <= 3 * min(size, rows):
                return size
        self._sums[rows] = self._sums.pop(ANY_SIZE, ExactSum())
        self._last[rows] = self._last.pop(ANY_SIZE, self._count)
        return rows
