"""Replayed rows by their stage: asked for, on their way, ready, and spent."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.rng import Purpose, RandomStream
from rehearsal_plugin.distributed.in_flight import Arrival, Refresh
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.runtime.replay_account import ReplayAccount, Turn
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio
from rehearsal_plugin.runtime.representatives import Representatives, Share
from rehearsal_plugin.runtime.step_plan import ANY_ROWS, StepPlan

__all__ = ["LEAD", "ReplayQueue"]

LOG = logging.getLogger(__name__)

LEAD = 3
"""Steps from asking for rows to seeing them, at most::

    step   training thread                     background
    t      batch seen: ask for r rows  ──────► headers of t go round, all ranks draw r rows,
                                               their owners read them
    t + 1  compute                     ──────► rows of t travel
    t + 2  compute                             (they arrive at its end)
    t + 3  replay r rows                       a loop of update() collects first: one step less
"""


class ReplayQueue:
    """Counts the rows that are due, asks for them, and hands them out to micro-batches.

    A step that looks like the one that asked for its rows gets them as they were planned. In other steps a micro-batch
    gets its own part by the account, and what the model is still owed is asked for once more. So the ratio is met over
    time, whatever steps look like.

    All calls are made on the training thread.

    Args:
        config: The `rehearsal` section.
        draws: Independent draws of a step.
        rank: This rank; keys the order of replayed rows.

    Attributes:
        ratio: How many rows are due.
        account: How many of them the model did not get.
    """

    def __init__(self, config: RehearsalConfig, draws: int, rank: int) -> None:
        self.ratio = ReplayRatio(config, draws)
        self.account = ReplayAccount(self.ratio, draws, LEAD)
        self._start_step, self._draws, self._rank = config.start_step, draws, rank
        self._orders = RandomStream(config.seed, Purpose.ORDER)
        self._turns: list[Turn] = []  # micro-batches since the last request
        self._requested: deque[StepPlan] = deque([StepPlan()])  # of each exchange, oldest first; the first brings none
        self._plan = StepPlan()  # of the rows that are ready
        self._expected: int | None = None  # rows of the micro-batch that `due` was asked for
        self._ready: Representatives | None = None
        self._spent: Representatives | None = None
        self._warned_of_room = False

    def due(self, step: int, rows: int | None = None) -> int:
        """Rows that the next micro-batch gets if it has room.

        Args:
            step: Number of the next exchange.
            rows: See `Turn`, for callers that make room by what they are told here; None for as many as planned.
        """
        self._expected = rows
        if self._ready is None or step < self._start_step:
            return 0
        return self._ready.most(self._share_for(rows))

    def take(self, step: int, turn: Turn, most: int | None) -> Share | None:
        """The rows of the next micro-batch, or None; `count_micro_batch` completes its turn.

        Args:
            step: Number of the next exchange.
            turn: With the rows of the micro-batch.
            most: Rows that there is room for; None for no limit.
        """
        if self._expected is not None:
            turn.rows, self._expected = self._expected, None
        self._turns.append(turn)
        if step < self._start_step:
            return None
        count = self._share_for(turn.rows)
        self.account.end_turn(turn.rows, self._plan.rate)
        turn.planned = self._plan.pop()
        if self._ready is None:
            return None
        room = count if most is None else min(count, most // self._draws)
        if count and not room:
            self._pass_on(turn.rows, count)
        share = self._ready.take(room)
        if share.count:
            turn.source, turn.index, turn.sizes = self._ready, share.index, share.sizes
        return share

    def count_micro_batch(self, turn: Turn, rows: int, amount: int, replayed: int) -> None:
        """Count what the model sees of a micro-batch.

        Args:
            turn: As `take` gave it.
            rows: See `Turn`.
            amount: The rows or tokens that the ratio is a share of.
            replayed: Those of replayed rows.
        """
        turn.rows, turn.amount = rows, amount
        due = self.ratio.due(amount, self._plan.rate)
        if turn.planned is not None and self._plan.rate is None:
            due = turn.planned[1] * self.ratio.row_cost, 1
        self.account.settle(turn, due, replayed)

    def undo(self, turn: Turn) -> bool:
        """Put back what a micro-batch of this step took, as it is not seen after all; False where that is too late."""
        if turn not in self._turns:
            return False
        self._turns.remove(turn)
        self.account.undo(turn)
        if turn.source is None or turn.source is self._ready:
            self._plan.put_back(turn.planned)
        if turn.source is not None and turn.source is self._ready and turn.index is not None:
            self._ready.put_back(turn.index, turn.sizes)
        return True

    @property
    def waiting(self) -> int:
        """Micro-batches since the last request."""
        return len(self._turns)

    def request(self, step: int, promised: int | None = None) -> Request:
        """Rows to ask for in each draw with the exchange of `step`, for as many micro-batches as there were.

        Args:
            step: Number of the exchange.
            promised: Rows that the other ranks count on; None where they can be told. What is missing stays owed.
        """
        self.ratio.go_by(step)
        seen = [(turn.rows, turn.amount) for turn in self._turns if turn.amount is not None]
        self._turns.clear()
        plan, rate = StepPlan(), (0, 1, 0)
        if step + LEAD >= self._start_step:
            shares = deque((rows, self.ratio.rows_for(amount)) for rows, amount in seen)
            on_the_way = sum(requested.owed for requested in self._requested)
            on_the_way += self._plan.owed if self._plan.untouched else 0
            owed = self.account.arrears(on_the_way, sum(amount for _, amount in seen))
            plan = StepPlan(shares, self.ratio.rate, owed)
            rate = (0, 0, 0) if owed else self.ratio.rate_of_step([amount for _, amount in seen])
        elif self._start_step:
            rate = (0, 0, 0)
        if promised is not None:
            plan.fit(promised)
        self._requested.append(plan)
        return Request(plan.requested, *rate)

    def receive(self, arrival: Arrival | None, step: int) -> None:
        """Make the rows of the exchange that ended ready, in random order; the ready ones are spent."""
        self._spent, self._ready = self._ready, None
        self._plan = self._requested.popleft()
        if self._plan.shares and step >= self._start_step:
            self.account.open()
        if arrival is not None:
            rng = partial(self._orders.at, step, self._rank)
            self._ready = Representatives.shuffled(arrival, self._draws, rng)
        arrived = 0 if self._ready is None else self._ready.left
        self.account.write_off(self._plan, arrived)

    def _share_for(self, rows: int | None) -> int:
        """Rows of each draw for the next micro-batch: as planned, or its own by the account if others leave it some."""
        planned = self._plan.next_share(rows, self.ratio)
        if self._ready is None or rows is None:
            return planned
        free = max(planned, self._ready.left - self._plan.for_later)
        if free == planned and not self.account.unequal:
            return planned
        return min(self.account.rows_for(rows, self._plan.rate, planned), free)

    def _pass_on(self, rows: int, count: int) -> None:
        """Rows of each draw that a micro-batch has no room for are owed to larger ones."""
        if not self.account.lacks_room(rows, count) and not self._warned_of_room:
            self._warned_of_room = True
            LOG.warning(
                "a micro-batch of %d rows has no room for a row of each of %d draws under rehearsal.mode 'replace', "
                "and none is larger, so rehearsal.ratio is not met; give larger batches, or take mode 'append'",
                rows,
                self._draws,
            )

    def update_state(self, index: Tensor, state: Mapping[str, Tensor]) -> None:
        """Give replayed rows new state, wherever they live; it is stored there after the step.

        Args:
            index: `[n]` int64, which rows; see `Share.index`.
            state: Values `[n, ...]` by name, all names of the state.
        """
        if self._ready is not None:
            self._ready.update(index, state)

    def take_refresh(self) -> Refresh | None:
        """New state of the spent rows, for their owners; None where there are none."""
        spent, self._spent = self._spent, None
        return None if spent is None else spent.refresh()

    def state_dict(self) -> dict[str, Any]:
        """All stages, as tensors, arrays and numbers."""
        seen = [(turn.rows, turn.amount) for turn in self._turns if turn.amount is not None]
        ready, spent = (None if rows is None else rows.state_dict() for rows in (self._ready, self._spent))
        return {
            "schedule": self.ratio.state_dict(),
            "amounts": [amount for _, amount in seen],
            "asked": [_shares(plan) for plan in self._requested],
            "ready": None if ready is None else {**ready, "shares": _shares(self._plan)},
            "spent": None if spent is None else {**spent, "shares": []},
            "account": {
                **self.account.state_dict(),
                "rows": [rows for rows, _ in seen],
                "requested": [plan.state_dict() for plan in self._requested],
                "ready": self._plan.state_dict(),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], layout: RowLayout | None, device: torch.device) -> None:
        """Take over what `state_dict` gave on this rank of as many; `layout` is None where there were no rows yet."""
        self.ratio.load_state_dict(state["schedule"])
        account, amounts = state.get("account"), [int(amount) for amount in state["amounts"]]
        if account is None:
            self._load_earlier(state)
        else:
            self.account.load_state_dict(account)
            self._requested = deque(map(StepPlan.load, account["requested"]))
            self._plan = StepPlan.load(account["ready"])
        rows = [ANY_ROWS] * len(amounts) if account is None else account["rows"]
        self._turns = [Turn(size, amount=amount) for size, amount in zip(rows, amounts, strict=True)]
        if layout is not None:
            self._ready, self._spent = (
                None if state[name] is None else Representatives.load(state[name], layout, device)
                for name in ("ready", "spent")
            )

    def _load_earlier(self, state: Mapping[str, Any]) -> None:
        """Take over the stages of a release without an account: it is opened now, and nothing is owed."""
        self._requested = deque(map(StepPlan.of_earlier_release, state["asked"]))
        if state["ready"] is not None:
            self._plan = StepPlan.of_earlier_release(state["ready"]["shares"])
            self.account.open()


def _shares(plan: StepPlan) -> list[int]:
    return [share for _, share in plan.shares]
