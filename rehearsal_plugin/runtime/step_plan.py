"""Rows that an exchange brings, as they were planned for the micro-batches of a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rehearsal_plugin.core.exact_sum import Ratio
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

__all__ = ["ANY_ROWS", "StepPlan"]

ANY_ROWS = -1
"""Rows of a micro-batch that were not noted, as in checkpoints of earlier releases."""


@dataclass
class StepPlan:
    """Rows of each draw that an exchange brings, planned for a step that looks like the one that asked for them.

    For example, a step of micro-batches of 8, 8 and 4 rows asked for 3, 2 and 2 rows, and for 2 that were owed::

        next step      8 rows   8 rows             three micro-batches less: 2 + 2 rows are left over, and still owed
        gets           3        2
        another step   8 rows   2 rows             not as planned: its own part by the account, out of
        gets           3        1                  rows that nobody else is planned to get

    Attributes:
        shares: Rows and share of each micro-batch that is still to come.
        rate: Rows or tokens due for each row or token seen, when they were asked for; None where it was not noted.
        owed: Rows beyond the shares.
        spare: Those of them that other ranks count on and that are not due here, as batches became smaller.
        untouched: Whether no micro-batch had its turn.
    """

    shares: deque[tuple[int, int]] = field(default_factory=deque)
    rate: Ratio | None = None
    owed: int = 0
    untouched: bool = True
    spare: int = 0

    def __post_init__(self) -> None:
        self.planned = sum(share for _, share in self.shares)

    @property
    def requested(self) -> int:
        """Rows of all shares, and those beyond."""
        return self.planned + self.owed

    def fit(self, rows: int) -> None:
        """Make it a plan for so many rows: others are owed, or were promised beyond it."""
        due = self.requested
        self.owed, self.spare = max(0, rows - self.planned), max(0, rows - due)
        surplus = max(0, self.planned - rows)
        for place in reversed(range(len(self.shares))):
            size, share = self.shares[place]
            cut = min(share, surplus)
            self.shares[place], surplus = (size, share - cut), surplus - cut
            self.planned -= cut

    def next_share(self, rows: int | None, ratio: ReplayRatio) -> int:
        """The share of the next micro-batch, 0 if it is not as planned.

        Args:
            rows: Its rows; None for as many as planned.
            ratio: Rows due for it. A share that differs by less than a row is a matter of rounding.
        """
        if not self.shares:
            return 0
        planned_rows, share = self.shares[0]
        if rows is None or planned_rows in (rows, ANY_ROWS):
            return share
        own, unit = ratio.due(rows, self.rate)
        return share if abs(share * unit - own) < unit else 0

    @property
    def for_later(self) -> int:
        """Rows that are planned for the micro-batches after the next one."""
        return self.planned - (self.shares[0][1] if self.shares else 0)

    def pop(self) -> tuple[int, int] | None:
        """A micro-batch had its turn: its rows and share, if there was one planned."""
        self.untouched = False
        if not self.shares:
            return None
        turn = self.shares.popleft()
        self.planned -= turn[1]
        return turn

    def put_back(self, turn: tuple[int, int] | None) -> None:
        """Undo `pop`."""
        if turn is not None:
            self.shares.appendleft(turn)
            self.planned += turn[1]

    def state_dict(self) -> dict[str, Any]:
        """The plan as numbers."""
        rate = None if self.rate is None else list(self.rate)
        shares = [list(planned) for planned in self.shares]
        spare = {"spare": self.spare} if self.spare else {}
        return {"shares": shares, "rate": rate, "owed": self.owed, "untouched": self.untouched, **spare}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> StepPlan:
        """What `state_dict` gave."""
        rate = None if state["rate"] is None else (state["rate"][0], state["rate"][1])
        shares = deque((rows, share) for rows, share in state["shares"])
        return cls(shares, rate, state["owed"], state["untouched"], state.get("spare", 0))

    @classmethod
    def of_earlier_release(cls, shares: Iterable[int]) -> StepPlan:
        """A plan of which only the shares were noted."""
        return cls(deque((ANY_ROWS, int(share)) for share in shares))
