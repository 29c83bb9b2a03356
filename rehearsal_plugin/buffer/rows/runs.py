"""Runs of bytes that lie anywhere in several arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rehearsal_plugin.buffer.rows.copies import copy_runs
from rehearsal_plugin.core.arrays import ByteArray, IntArray

__all__ = ["Runs"]


@dataclass(frozen=True)
class Runs:
    """Where n runs lie: run i begins at byte `starts[i]` of `arrays[which[i]]`.

    Attributes:
        arrays: `[any]` uint8 each, contiguous.
        which: `[n]` int64.
        starts: `[n]` int64.
    """

    arrays: list[ByteArray]
    which: IntArray
    starts: IntArray

    def __len__(self) -> int:
        return len(self.which)

    @classmethod
    def within(cls, array: ByteArray, starts: IntArray) -> Runs:
        """Runs of one array."""
        return cls([array], np.zeros_like(starts), starts)

    @classmethod
    def packed(cls, array: ByteArray, sizes: IntArray) -> Runs:
        """Runs of `sizes` `[n]` bytes that follow each other in one array."""
        return cls.within(array, sizes.cumsum() - sizes)

    def select(self, index: IntArray) -> Runs:
        """The runs at `index` `[m]`."""
        return Runs(self.arrays, self.which[index], self.starts[index])

    def copy_to(self, to: Runs, sizes: IntArray) -> None:
        """Copy `sizes` `[n]` bytes of each run to those of `to`, which must not overlap."""
        copy_runs(to.arrays, to.which, to.starts, self.arrays, self.which, self.starts, sizes)
