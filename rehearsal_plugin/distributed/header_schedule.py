"""Which exchanges have headers: those in which a rank may have something to tell.

Each header promises for how many exchanges its rank will have nothing to tell, and the smallest promise of all ranks
holds. A rank promises nothing until its headers have been alike for a while, then 1, 3, 7 exchanges and so on. Three
ranks, of which rank 2 begins to ask for other rows at exchange 5::

    exchange      0   1   2   3   4   5   6   7   8
    rank 0        0   1   .   3   .   .   .   0        what it promises, . where there is no header
    rank 1        0   1   .   3   .   .   .   0
    rank 2        0   1   .   3   .   .   .   0        told at 7: until then all ranks go by what it said at 3

So a change is known after `LONGEST` exchanges at the latest, and all ranks agree on the schedule with no message more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rehearsal_plugin.core.arrays import IntArray

__all__ = ["LONGEST", "STEADY_AFTER", "HeaderSchedule"]

STEADY_AFTER = 32
"""Headers of a rank that must be alike before it promises anything."""

LONGEST = 64
"""Exchanges from one header to the next, at most."""


class HeaderSchedule:
    """When this rank and the others tell each other something.

    Args:
        most_apart: Exchanges from one header to the next that a rank asks for at least, once there were as many; 1
            where it wants each change to be known.
        always: Whether every exchange has headers.
    """

    def __init__(self, most_apart: int = 1, *, always: bool = False) -> None:
        self._most_apart, self._always = most_apart, always
        self._first: int | None = None
        self._next = 0
        self._unchanged = 0  # headers like the one before
        self._told: list[int] = []

    def is_due(self, step: int) -> bool:
        """Whether the exchange `step` has headers; the first one has."""
        return self._first is None or step >= self._next

    def promise(self, step: int, told: list[int], *, steady: bool) -> int:
        """Exchanges after this one for which this rank will have nothing to tell.

        Args:
            step: Number of the exchange, which has headers.
            told: The words of the header that may change.
            steady: Whether nothing else changes that the others need, as the rows of a buffer that is not full.
        """
        self._unchanged = self._unchanged + 1 if steady and told == self._told else 0
        self._told = told
        if self._always:
            return 0
        doublings = max(0, self._unchanged - STEADY_AFTER + 1)
        sparse = min(self._most_apart - 1, step - (step if self._first is None else self._first))
        return max(sparse, min(1 << min(doublings, LONGEST), LONGEST) - 1)

    def agree(self, step: int, promises: IntArray) -> None:
        """Take the promises of all ranks, `[ranks]` int64, in the headers of the exchange `step`."""
        self._first = step if self._first is None else self._first
        self._next = step + 1 + int(promises.min())

    def state_dict(self) -> dict[str, Any]:
        """When the next headers are due, and what this rank told last."""
        return {"first": self._first, "next": self._next, "unchanged": self._unchanged, "told": self._told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._first, self._next = state["first"], int(state["next"])
        self._unchanged, self._told = int(state["unchanged"]), list(state["told"])
