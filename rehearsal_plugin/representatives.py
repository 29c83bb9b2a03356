"""The rows of one optimizer step, shared out between its micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.exchange import Arrival

__all__ = ["Representatives"]


class Representatives:
    """Rows that arrived together, in random order.

    They arrive grouped by owner; without the shuffle, micro-batches would get their rows from different ranks.

    Args:
        arrival: The rows.
        turns: Independent draws.
        shares: How many rows of each draw every micro-batch takes.
        rng: Source of the order.
    """

    def __init__(self, arrival: Arrival, turns: int, shares: Sequence[int], rng: np.random.Generator) -> None:
        self._rows = arrival.rows
        self._orders = [rng.permutation(np.flatnonzero(arrival.turns == turn)) for turn in range(turns)]
        self._shares = deque(shares)

    @property
    def due(self) -> int:
        """Rows of the next micro-batch, of all draws together."""
        return sum(min(self._shares[0], len(order)) for order in self._orders) if self._shares else 0

    def take(self, most: int | None) -> tuple[Tensor, list[int]]:
        """The rows of the next micro-batch.

        Args:
            most: Rows that there is room for; None for no limit.

        Returns:
            The rows `[r, row_bytes]` uint8, draw by draw, and how many of them each draw gave.
        """
        share = self._shares.popleft() if self._shares else 0
        if most is not None:
            share = min(share, most // len(self._orders))
        chosen = [order[:share] for order in self._orders]
        self._orders = [order[share:] for order in self._orders]
        index = torch.from_numpy(np.concatenate(chosen)).to(self._rows.device)
        return self._rows.index_select(0, index), [len(part) for part in chosen]
