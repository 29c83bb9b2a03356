"""The account of the ratio: rows that are due by what the model saw, less those that it got."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor

from rehearsal_plugin.runtime.replay_ratio import ReplayRatio
from rehearsal_plugin.runtime.representatives import Representatives

__all__ = ["ANY_ROWS", "ReplayAccount", "StepPlan", "Turn"]

CATCH_UP = Fraction(1, 2)
"""Of its own rows, how many more a micro-batch gets while arrears are paid, so that its memory hardly grows."""

ANY_ROWS = -1
"""Rows of a micro-batch that were not noted, as in checkpoints of earlier releases."""


@dataclass(eq=False)
class Turn:
    """A micro-batch that the model sees: what it took, so that it can be undone.

    Attributes:
        rows: New and replayed rows with `mode: replace`, new rows with `append`.
        staged: Its number among the micro-batches whose candidates are staged; None until they are.
        planned: The entry of the plan that it used up.
        source: The arrival that gave it rows; None for none.
        index: `[r]` int64, which rows of that.
        sizes: How many of them each draw gave.
        amount: Rows or tokens that the ratio is a share of; None until they are counted.
        change: By how much it changed what the model is owed.
    """

    rows: int
    staged: int | None = None
    planned: tuple[int, int] | None = None
    source: Representatives | None = None
    index: Tensor | None = None
    sizes: Sequence[int] = ()
    amount: int | None = None
    change: Fraction = Fraction(0)


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
        untouched: Whether no micro-batch had its turn.
    """

    shares: deque[tuple[int, int]] = field(default_factory=deque)
    rate: Fraction | None = None
    owed: int = 0
    untouched: bool = True

    def __post_init__(self) -> None:
        self.planned = sum(share for _, share in self.shares)

    @property
    def requested(self) -> int:
        """Rows of all shares, and those beyond."""
        return self.planned + self.owed

    def next_share(self, rows: int | None, own: Fraction) -> int:
        """The share of the next micro-batch, 0 if it is not as planned.

        Args:
            rows: Its rows; None for as many as planned.
            own: Rows of each draw that are due for it. A share that differs by less than a row is a matter of rounding.
        """
        if not self.shares:
            return 0
        planned_rows, share = self.shares[0]
        return share if rows is None or planned_rows in (rows, ANY_ROWS) or abs(share - own) < 1 else 0

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
        rate = None if self.rate is None else _pair(self.rate)
        shares = [list(planned) for planned in self.shares]
        return {"shares": shares, "rate": rate, "owed": self.owed, "untouched": self.untouched}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> StepPlan:
        """What `state_dict` gave."""
        rate = None if state["rate"] is None else Fraction(*state["rate"])
        return cls(deque((rows, share) for rows, share in state["shares"]), rate, state["owed"], state["untouched"])

    @classmethod
    def of_earlier_release(cls, shares: Iterable[int]) -> StepPlan:
        """A plan of which only the shares were noted."""
        return cls(deque((ANY_ROWS, int(share)) for share in shares))


class ReplayAccount:
    """Rows or tokens of each draw that the model is owed: due by what it saw, less what it got.

    It is opened when the first rows may be handed out: steps before that are owed nothing. The arithmetic is rational.

    Args:
        ratio: How much is due.
        draws: Independent draws that share it.
        lead: Steps from asking for rows to seeing them.
    """

    def __init__(self, ratio: ReplayRatio, draws: int, lead: int) -> None:
        self._ratio, self._draws, self._lead = ratio, draws, lead
        self._owed: Fraction | None = None
        self._catch_up = Fraction(0)  # part of a row that may be handed out beyond a micro-batch's own

    def open(self) -> None:
        """Begin to count, if that has not happened."""
        if self._owed is None:
            self._owed = Fraction(0)

    def rows_for(self, rows: int, rate: Fraction | None) -> int:
        """Rows of each draw for a micro-batch that nobody planned: what is owed with it, in bounds.

        Args:
            rows: See `Turn`.
            rate: See `StepPlan`.
        """
        if self._owed is None:
            return 0
        own = self._ratio.due(rows, rate)  # a row of tokens counts for the mean one
        owed = self._owed / self._ratio.row_cost
        part = owed - math.floor(owed)  # of a row: a micro-batch of one row gets none most of the time
        most = math.floor(part + own) + math.floor(self._catch_up + CATCH_UP * own)
        return max(0, min(math.floor(owed + own), most))

    def end_turn(self, rows: int, rate: Fraction | None) -> None:
        """Keep the part of a row that a micro-batch of so many `rows` might have got while arrears are paid."""
        if self._owed is not None:
            self._catch_up = (self._catch_up + CATCH_UP * self._ratio.due(rows, rate)) % 1

    def settle(self, due: Fraction, replayed: int) -> Fraction:
        """Count a micro-batch: what was due for it, and rows or tokens of all draws that it got. Returns the change."""
        change = due - Fraction(replayed, self._draws)
        self.undo(-change)
        return change

    def undo(self, change: Fraction) -> None:
        """Take back a change that `settle` returned."""
        if self._owed is not None:
            self._owed -= change

    def write_off(self, rows: int) -> None:
        """Rows of each draw that no buffer had are not owed any more."""
        self.undo(Fraction(rows * self._ratio.row_cost))

    def arrears(self, on_the_way: int, amount: int) -> int:
        """Rows of each draw to ask for beyond the shares of a step.

        Tokens are known when rows are there, so for them less than the rows of one `lead` may only be a matter of
        time.

        Args:
            on_the_way: Such rows asked for before.
            amount: Rows or tokens that the model saw in the step.
        """
        if self._owed is None:
            return 0
        slack = (
            self._lead * self._ratio.due(amount) if self._ratio.in_tokens else 1
        )  # a row may be a matter of rounding
        return max(0, math.floor((self._owed - slack) / self._ratio.row_cost) - on_the_way)

    def state_dict(self) -> dict[str, Any]:
        """What is owed, as fractions."""
        return {"owed": None if self._owed is None else _pair(self._owed), "catch_up": _pair(self._catch_up)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._owed = None if state["owed"] is None else Fraction(*state["owed"])
        self._catch_up = Fraction(*state["catch_up"])


def _pair(number: Fraction) -> list[int]:
    return [number.numerator, number.denominator]
