"""Losses on replayed rows that all ranks tell each other, so that the guard does the same on all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import Notes, Word
from rehearsal_plugin.runtime.forgetting_guard import ForgettingGuard
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

__all__ = ["LossConsensus"]

FIXED_POINT = 1 << 20
"""Losses travel as integers, in units of its reciprocal: their sum is the same on all ranks in any order."""

LARGEST_LOSS = 1e12
"""Of a sum of losses that is told; others count as not measured."""

NOT_FINITE = -1
"""Weight that tells of a measurement that was NaN, infinite or too large."""


class LossConsensus:
    """Tells the other ranks what was measured here, and the guard what was measured on all of them.

    A measurement is told with the next header. The guard hears of it once every rank has told as many.

    Args:
        config: The `rehearsal` section.
        rank: This rank.
        good: The last good checkpoint of an earlier guard.

    Attributes:
        guard: Watches the loss on replayed rows; None for nobody.
    """

    def __init__(self, config: RehearsalConfig, rank: int, good: str | None = None) -> None:
        self.guard = None if config.guard is None else ForgettingGuard(config.guard, rank, good)
        self._sum = self._weight = self._measured = 0
        self._heard = 0  # measurements that the guard knows of

    @property
    def notes(self) -> Notes:
        """This rank's words in the next header; none without a guard, as nobody would read them."""
        if self.guard is None:
            return Notes()
        return Notes(loss_sum=self._sum, loss_weight=self._weight, losses_measured=self._measured)

    def report(self, total: float, weight: float) -> None:
        """Tell the others, with the next header, the sum of losses on replayed rows, and what it is divided by."""
        sound = math.isfinite(total) and abs(total) < LARGEST_LOSS
        scaled = (round(total * FIXED_POINT), round(weight * FIXED_POINT)) if sound else (0, NOT_FINITE)
        self._sum, self._weight = scaled
        self._measured += 1

    def hear(self, notes: IntArray, step: int, ratio: ReplayRatio) -> None:
        """Have the guard hear what all ranks measured, once all have told of it.

        Args:
            notes: `[ranks, NOTES]` int64, from the last headers.
            step: Number of the next exchange.
            ratio: What the guard may raise.

        Raises:
            ForgettingError: The guard ends the job.
        """
        if self.guard is None:
            return
        sums, weights, measured = (
            notes[:, word - Word.MIXTURE].astype(np.float64)
            for word in (Word.LOSS_SUM, Word.LOSS_WEIGHT, Word.LOSSES_MEASURED)
        )
        if int(measured.min()) <= self._heard:
            return
        self._heard = int(measured.min())
        finite = weights > 0
        if finite.any():
            self.guard.hear(float(sums.sum() / weights[finite].sum()), step, ratio)
        elif weights.min() == NOT_FINITE:
            self.guard.hear_nothing_finite(step)

    def state_dict(self) -> dict[str, Any]:
        """What was measured last, and what the guard remembers."""
        guard = None if self.guard is None else self.guard.state_dict()
        return {"words": [self._sum, self._weight, self._measured], "heard": self._heard, "guard": guard}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._sum, self._weight, self._measured = (int(word) for word in state["words"])
        self._heard = int(state["heard"])
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])
