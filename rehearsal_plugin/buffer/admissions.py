"""Step and rank of admission of each row."""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.core.arrays import IntArray, RankArray

__all__ = ["Admissions"]


class Admissions:
    """The step and the rank of admission of every row, by slot.

    Args:
        capacity: Slots.
        rank: The one that admits rows from now on.
    """

    def __init__(self, capacity: int, rank: int) -> None:
        self._rank = rank
        self._steps = np.full(capacity, -1, dtype=np.int64)
        self._ranks: RankArray | None = None  # until there are rows of others

    def note_admission(self, slots: IntArray, step: int) -> None:
        """Rows at `slots` `[n]` were admitted on this rank in a step."""
        self._steps[slots] = step
        if self._ranks is not None:
            self._ranks[slots] = self._rank

    def steps(self, slots: IntArray | slice) -> IntArray:
        """The step in which each row at `slots` `[n]` was admitted, `[n]` int64; a view for a slice."""
        return self._steps[slots]

    def ranks(self, slots: IntArray | slice) -> RankArray:
        """The rank on which each row at `slots` `[n]` was admitted, `[n]` int32."""
        if self._ranks is None:
            return np.full(len(self._steps[slots]), self._rank, dtype=np.int32)
        return self._ranks[slots]

    def take_over(self, steps: IntArray, ranks: RankArray) -> None:
        """Rows at the first slots were admitted in `steps` `[n]`, on `ranks` `[n]`.

        Raises:
            ValueError: `steps` and `ranks` differ in length.
        """
        if len(steps) != len(ranks):
            raise ValueError(f"{len(steps)} steps and {len(ranks)} ranks")
        self._steps[: len(steps)] = steps
        if np.any(ranks != self._rank):
            self._ranks = np.full(len(self._steps), self._rank, dtype=np.int32)
            self._ranks[: len(ranks)] = ranks
