"""The rows of one optimizer step, shared out between its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rehearsal_plugin.buffer.rows.fields import ALIGNMENT
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.narrowing import widened
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.in_flight import Arrival, Refresh

__all__ = ["Representatives", "Share"]


@dataclass(frozen=True)
class Share:
    """The rows of one micro-batch.

    Attributes:
        rows: `[r, row_bytes]` uint8, draw by draw.
        sizes: How many of them each draw gave.
        index: `[r]` int64, which rows of the arrival they are.
        layout: How they are packed.
        longest: See `Arrival`.
    """

    rows: Tensor
    sizes: list[int]
    index: Tensor
    layout: RowLayout
    longest: int | None = None

    def fields(self, layout: RowLayout) -> dict[str, Tensor]:
        """Their fields by name for batches of a layout: views, or copies where that is padded in another way."""
        if layout.pads == self.layout.pads:
            return self.layout.views(self.rows, self.longest)
        return widened(self.rows, self.layout, layout)

    @property
    def count(self) -> int:
        """Rows of all draws together."""
        return self.rows.shape[0]


class Representatives:
    """Rows that arrived together, in random order.

    They arrive grouped by owner; without the shuffle, micro-batches would get their rows from different ranks. For
    example, five rows of two draws, given to micro-batches that take one of each draw::

        draw of each row    0 0 1 0 1
        draws (shuffled)    [3, 0, 1]  [2, 4]
        micro-batch 0       rows 3, 2         left  [0, 1]  [4]
        micro-batch 1       rows 0, 4         left  [1]     []

    Where one micro-batch takes the rows of the only draw, their order does not matter, and none is drawn.

    Args:
        arrival: The rows.
        order: Gives, for each draw, which rows of the arrival are still to be given, in their order; called once.
    """

    def __init__(self, arrival: Arrival, order: Callable[[], list[IntArray]]) -> None:
        self._arrival, self._layout, self._order = arrival, arrival.source.layout, order
        self._ordered: list[IntArray] | None = None
        self._state: Tensor | None = None

    @classmethod
    def shuffled(cls, arrival: Arrival, draws: int, rng: Callable[[], np.random.Generator]) -> Representatives:
        """The rows of so many independent draws, in an order from the generator that `rng` gives."""

        def order() -> list[IntArray]:
            numbers, numbered = arrival.source.plan.draw_numbers, rng()
            return [numbered.permutation(np.flatnonzero(numbers == number)) for number in range(draws)]

        shuffled = cls(arrival, order)
        if draws > 1:
            shuffled._ordered = order()
        return shuffled

    def state_dict(self) -> dict[str, Any]:
        """What is left of them, as plain tensors, arrays and numbers."""
        orders = {str(number): rows for number, rows in enumerate(self._draws)}
        return {"arrival": self._arrival.state_dict(), "orders": orders, "state": self._state}

    @classmethod
    def load(cls, state: Mapping[str, Any], layout: RowLayout, device: torch.device) -> Representatives:
        """What `state_dict` gave of rows of a layout, with the rows on `device`."""
        draws = [state["orders"][str(number)] for number in range(len(state["orders"]))]
        loaded = cls(Arrival.load(state["arrival"], layout, device), lambda: draws)
        loaded._ordered = draws
        loaded._state = None if state["state"] is None else state["state"].to(device)
        return loaded

    @property
    def left(self) -> int:
        """Rows that every draw still has."""
        return self._arrival.rows.shape[0] if self._ordered is None else min(len(rows) for rows in self._ordered)

    def most(self, share: int) -> int:
        """Rows that `take(share)` would give, of all draws together."""
        return min(share, self.left) if self._ordered is None else sum(min(share, len(rows)) for rows in self._ordered)

    def take(self, share: int) -> Share:
        """The next rows, as many as `share` of each draw, or fewer where there are no more."""
        arrived = self._arrival.rows.shape[0]
        if share >= arrived and (self._ordered is None or [len(draw) for draw in self._ordered] == [arrived]):
            return self._take_all()
        chosen = [rows[:share] for rows in self._draws]
        self._draws = [rows[share:] for rows in self._draws]
        index = torch.from_numpy(np.concatenate(chosen)).to(self._arrival.rows.device)
        rows = self._arrival.rows.index_select(0, index)
        return Share(rows, [len(part) for part in chosen], index, self._layout, self._arrival.longest)

    def _take_all(self) -> Share:
        """All rows of the only draw, where they lie: one micro-batch gets them, so their order does not matter."""
        self._ordered = [np.empty(0, dtype=np.int64)]
        rows = self._arrival.rows
        count = rows.shape[0]
        return Share(rows, [count], _numbers(count, rows.device), self._layout, self._arrival.longest)

    def put_back(self, index: Tensor, sizes: Sequence[int]) -> None:
        """Undo `take`: the rows at `index` `[r]` are the next ones; `sizes` says how many each draw gave."""
        parts = np.split(index.cpu().numpy(), np.cumsum(sizes)[:-1])
        self._draws = [np.concatenate((part, rows)) for part, rows in zip(parts, self._draws, strict=True)]

    def update(self, index: Tensor, state: Mapping[str, Tensor]) -> None:
        """Give rows of the arrival at `index` `[n]` new state, values `[n, ...]` by name."""
        if self._state is None:
            self._state = self._packed_state().clone()
        for name, view in self._layout.state_of(self._state).items():
            view[index] = state[name].to(view.device)

    def refresh(self) -> Refresh:
        """The state of all rows of the arrival, to be sent back to their owners, and whether any of it is new."""
        state, new = (self._packed_state(), 0) if self._state is None else (self._state, 1)
        packed = functional.pad(state, (0, ALIGNMENT), value=new)  # by as much as keeps fields aligned
        return Refresh(packed, self._arrival.source)

    @property
    def _draws(self) -> list[IntArray]:
        """For each draw, the rows that are left, in their order."""
        if self._ordered is None:
            self._ordered = self._order()
        return self._ordered

    @_draws.setter
    def _draws(self, draws: list[IntArray]) -> None:
        self._ordered = draws

    def _packed_state(self) -> Tensor:
        return self._arrival.rows[:, self._layout.row_bytes - self._layout.state_bytes :]


@lru_cache(maxsize=64)
def _numbers(count: int, device: torch.device) -> Tensor:
    """`[count]` int64, from 0 on; nobody writes to it."""
    return torch.arange(count, device=device)
