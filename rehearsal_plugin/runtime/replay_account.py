"""The account of the ratio: rows that are due by what the model saw, less those that it got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rehearsal_plugin.core.exact_sum import ExactSum, Ratio
from rehearsal_plugin.runtime.owed_by_size import FORGOTTEN_AFTER, OwedBySize
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio
from rehearsal_plugin.runtime.representatives import Representatives
from rehearsal_plugin.runtime.step_plan import StepPlan

__all__ = ["ReplayAccount", "Turn"]

CATCH_UP = 2
"""A micro-batch gets its own rows over this many more while arrears are paid, so that its memory hardly grows."""

PATIENCE = 32
"""Steps after which rows that are still owed are asked for otherwise."""


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
    change: Ratio = (0, 1)


class ReplayAccount:
    """Rows or tokens of each draw that the model is owed: due by what it saw, less what it got.

    It is opened when the first rows may be handed out: steps before that are owed nothing. The arithmetic is exact, and
    micro-batches of different size have accounts of their own, see `OwedBySize`.

    Args:
        ratio: How much is due.
        draws: Independent draws that share it.
        lead: Steps from asking for rows to seeing them.
    """

    def __init__(self, ratio: ReplayRatio, draws: int, lead: int) -> None:
        self._ratio, self._draws, self._lead = ratio, draws, lead
        self._owed: OwedBySize | None = None
        self._catch_up = ExactSum()  # part of a row that may be handed out beyond a micro-batch's own
        self._largest_step = self._since_largest = 0
        self._steps_in_debt, self._since_debt = 0, FORGOTTEN_AFTER

    def open(self) -> None:
        """Begin to count, if that has not happened."""
        if self._owed is None:
            self._owed = OwedBySize()

    @property
    def unequal(self) -> bool:
        """Whether micro-batches differ in size."""
        return self._owed is not None and self._owed.several

    def rows_for(self, rows: int, rate: Ratio | None, planned: int) -> int:
        """Rows of each draw for a micro-batch: those planned, or what is owed with it, in bounds.

        Where micro-batches differ in size, the plan was made for others: no more than what is owed.

        Args:
            rows: See `Turn`.
            rate: See `StepPlan`.
            planned: Its share of the plan.
        """
        if self._owed is None:
            return planned
        owed, (due, unit) = self._owed.to(self._ratio.size_of(rows)), self._ratio.due(rows, rate)
        row = owed.denominator * unit * self._ratio.row_cost  # a row of tokens counts for the mean one
        had, own = owed.numerator * unit, due * owed.denominator * self._ratio.row_cost
        # Of a row: a micro-batch of one row gets none most of the time.
        most = (had % row + own) // row + self._beyond(due, unit).floor()
        all_owed = max(0, (had + own) // row)
        return min(max(planned, most), all_owed) if self._owed.several else max(planned, min(all_owed, most))

    def end_turn(self, rows: int, rate: Ratio | None) -> None:
        """Keep the part of a row that a micro-batch of so many `rows` might have got while arrears are paid."""
        if self._owed is not None:
            self._owed.note_micro_batch(self._ratio.size_of(rows))
            self._catch_up = self._beyond(*self._ratio.due(rows, rate))
            self._catch_up.numerator %= self._catch_up.denominator

    def settle(self, turn: Turn, due: Ratio, replayed: int) -> None:
        """Count a micro-batch: what was due for it, and rows or tokens of all draws that it got."""
        change = ExactSum(due)
        change.add((-replayed, self._draws))
        turn.change = change.ratio
        if self._owed is not None:
            self._owed.to(self._ratio.size_of(turn.rows)).add(turn.change)

    def undo(self, turn: Turn) -> None:
        """Take back what `settle` counted."""
        if self._owed is not None:
            self._owed.to(self._ratio.size_of(turn.rows)).add(turn.change, times=-1)

    def lacks_room(self, rows: int, count: int) -> bool:
        """Rows of each draw that a micro-batch of `rows` has no room for; False where none has: it is lost."""
        return self._owed is None or self._owed.pass_on(self._ratio.size_of(rows), count * self._ratio.row_cost)

    def write_off(self, plan: StepPlan, arrived: int) -> None:
        """Rows of each draw that no buffer had are not owed any more."""
        missing = plan.requested - plan.spare - arrived
        if self._owed is None or missing <= 0:
            return
        if self._in_trouble:  # what is owed was asked for more than once
            missing = max(0, plan.planned - arrived)
            missing += max(0, self._rows_owed() - missing - max(0, arrived - plan.planned))
        self._owed.write_off(missing * self._ratio.row_cost)

    def arrears(self, on_the_way: int, amount: int) -> int:
        """Rows of each draw to ask for beyond the shares of a step.

        Tokens are known when rows are there, so for them less than the rows of one `lead` may only be a matter of
        time. Rows that were asked for after a large step may come to small ones, again and again. So where some are
        owed for long, every step asks for all of them, and for as many as the largest of the last steps needs.

        Args:
            on_the_way: Such rows asked for before.
            amount: Rows or tokens that the model saw in the step.
        """
        if self._owed is None:
            return 0
        self._note_step(amount)
        due, unit = self._ratio.due(amount)
        slack = (-self._lead * due, unit) if self._ratio.in_tokens else (-1, 1)  # a row may be a matter of rounding
        owed = max(0, self._rows_owed(slack))
        self._note_debt(bool(owed))
        if not self._in_trouble:
            return max(0, owed - on_the_way)
        largest, _ = self._ratio.due(self._largest_step)
        return owed + (largest - due) // (unit * self._ratio.row_cost)

    @property
    def _in_trouble(self) -> bool:
        """Whether rows were owed for long lately: they come to steps that cannot take them."""
        return self._since_debt < FORGOTTEN_AFTER

    def _note_step(self, amount: int) -> None:
        """Remember the amount of the largest of the last steps."""
        self._since_largest += 1
        if amount >= self._largest_step or self._since_largest > FORGOTTEN_AFTER:
            self._largest_step, self._since_largest = amount, 0

    def _note_debt(self, is_owed: bool) -> None:
        """Count the steps for which rows were owed, and those since that took too long."""
        self._steps_in_debt = self._steps_in_debt + 1 if is_owed else 0
        self._since_debt = 0 if self._steps_in_debt >= PATIENCE else self._since_debt + 1

    def state_dict(self) -> dict[str, Any]:
        """What is owed, as fractions."""
        if self._owed is None:
            return {"owed": None, "catch_up": self._catch_up.reduced}
        return {
            "owed": self._owed.total().reduced,
            "catch_up": self._catch_up.reduced,
            "sizes": self._owed.state(),
            "steps": [self._largest_step, self._since_largest, self._steps_in_debt, self._since_debt],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._owed = None
        if state["owed"] is not None:
            sizes = state.get("sizes")
            self._owed = OwedBySize.of_earlier_release(state["owed"]) if sizes is None else OwedBySize.load(sizes)
        self._catch_up = ExactSum((state["catch_up"][0], state["catch_up"][1]))
        steps = state.get("steps", (0, 0, 0, FORGOTTEN_AFTER))
        self._largest_step, self._since_largest, self._steps_in_debt, self._since_debt = steps

    def _beyond(self, due: int, unit: int) -> ExactSum:
        """Rows that a micro-batch may get beyond its own, of which whole ones are handed out."""
        beyond = ExactSum(self._catch_up.ratio)
        beyond.add((due, unit * CATCH_UP))
        return beyond

    def _rows_owed(self, slack: Ratio = (0, 1)) -> int:
        """Whole rows of each draw that are owed to all sizes together, with so much more or less."""
        assert self._owed is not None
        owed = self._owed.total()
        owed.add(slack)
        return owed.floor(self._ratio.row_cost)
