"""Replayed rows by their stage: asked for, on their way, ready, and spent."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.rng import Purpose, RandomStream
from rehearsal_plugin.distributed.in_flight import Arrival, Refresh
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio
from rehearsal_plugin.runtime.representatives import Representatives, Share

__all__ = ["LEAD", "ReplayQueue"]

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

    All calls are made on the training thread.

    Args:
        config: The `rehearsal` section.
        draws: Independent draws of a step.
        rank: This rank; keys the order of replayed rows.

    Attributes:
        ratio: How many rows are due.
    """

    def __init__(self, config: RehearsalConfig, draws: int, rank: int) -> None:
        self.ratio = ReplayRatio(config, draws)
        self._start_step, self._draws, self._rank = config.start_step, draws, rank
        self._orders = RandomStream(config.seed, Purpose.ORDER)
        self._amounts: list[int] = []  # rows or tokens of the micro-batches since the last request
        self._requested: deque[list[int]] = deque([[]])  # shares of each exchange, oldest first; the first brings none
        self._ready: Representatives | None = None
        self._spent: Representatives | None = None

    def due(self, step: int) -> int:
        """Rows that the next micro-batch gets if it has room; `step` is the number of the next exchange."""
        return 0 if self._ready is None or step < self._start_step else self._ready.due

    def count_micro_batch(self, amount: int) -> None:
        """Count a micro-batch that the model sees, by the rows or tokens that the ratio is a share of."""
        self._amounts.append(amount)

    def request(self, step: int) -> int:
        """Rows to ask for in each draw with the exchange of `step`, for as many micro-batches as there were."""
        self.ratio.go_by(step)
        replays = step + LEAD >= self._start_step
        shares = [self.ratio.rows_for(amount) for amount in self._amounts] if replays else []
        self._amounts.clear()
        self._requested.append(shares)
        return sum(shares)

    def receive(self, arrival: Arrival | None, layout: RowLayout, step: int) -> None:
        """Make the rows of the exchange that ended ready, in random order; the ready ones are spent."""
        self._spent, self._ready = self._ready, None
        shares = self._requested.popleft()
        if arrival is not None:
            rng = self._orders.at(step, self._rank)
            self._ready = Representatives.shuffled(arrival, layout, self._draws, shares, rng)

    def take(self, step: int, most: int | None) -> Share | None:
        """The rows of the next micro-batch, or None.

        Args:
            step: Number of the next exchange.
            most: Rows that there is room for; None for no limit.
        """
        return None if self._ready is None or step < self._start_step else self._ready.take(most)

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
        return {
            "schedule": self.ratio.state_dict(),
            "amounts": list(self._amounts),
            "asked": [list(shares) for shares in self._requested],
            "ready": None if self._ready is None else self._ready.state_dict(),
            "spent": None if self._spent is None else self._spent.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], layout: RowLayout | None, device: torch.device) -> None:
        """Take over what `state_dict` gave on this rank of as many; `layout` is None where there were no rows yet."""
        self.ratio.load_state_dict(state["schedule"])
        self._amounts = [int(amount) for amount in state["amounts"]]
        self._requested = deque([[int(share) for share in shares] for shares in state["asked"]])
        if layout is not None:
            self._ready, self._spent = (
                None if state[name] is None else Representatives.load(state[name], layout, device)
                for name in ("ready", "spent")
            )
