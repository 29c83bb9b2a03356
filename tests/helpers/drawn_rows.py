"""The rows that all ranks of a draw send, each told by its rank alone, as one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.distributed.draw import Moves, Numbers, Plan, plan


@dataclass(frozen=True)
class DrawnRows:
    """Arrays `[rows]` int64, as in `Moves`, with the owner of each row; and the moves of each rank."""

    owner: IntArray
    reader: IntArray
    draw_number: IntArray
    partition: IntArray
    index: IntArray
    moves: list[Moves]

    @property
    def plans(self) -> list[Plan]:
        return [plan(moves, len(self.moves)) for moves in self.moves]


def numbers(step: int, rank: int = 0, stream: int = 0) -> Numbers:
    """Random numbers of a rank in a step."""
    return Numbers(generator(0, Purpose.DRAW, step, stream), generator(0, Purpose.PICK, step, rank + stream))


def drawn_rows(draw_for: Callable[[int, Numbers], Moves], ranks: int, step: int = 0) -> DrawnRows:
    """Call `draw_for(rank, numbers)` for each rank."""
    moves = [draw_for(rank, numbers(step, rank)) for rank in range(ranks)]
    owner = np.repeat(np.arange(ranks), [len(each.reader) for each in moves])
    names = ("reader", "draw_number", "partition", "index")
    columns = {name: np.concatenate([getattr(each, name) for each in moves]) for name in names}
    return DrawnRows(owner, **columns, moves=moves)
