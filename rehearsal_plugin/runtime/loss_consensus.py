"""Losses on replayed rows that all ranks tell each other, so that what follows from them is the same on all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import Notes, Word
from rehearsal_plugin.runtime.forgetting import Forgetting
from rehearsal_plugin.runtime.forgetting_guard import ForgettingGuard
from rehearsal_plugin.runtime.partition_losses import FIXED_POINT, LARGEST_LOSS, PartitionLosses, Tally
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

__all__ = ["LossConsensus"]

NOT_FINITE = -1
"""Weight that tells of a measurement that was NaN, infinite or too large."""


class LossConsensus:
    """Tells the other ranks what was measured here, and those who act on it what was measured on all of them.

    A measurement is told with the next header. The guard hears of it once every rank has told as many; the budget and
    the mixture hear the sums by partition of each header.

    Args:
        config: The `rehearsal` section.
        rank: This rank.
        before: That of the same job before a restart: its last good checkpoint, and how far it has forgotten.

    Attributes:
        guard: Watches the loss on replayed rows; None for nobody.
        forgetting: Sets the ratio and the mixture; None where nothing follows the losses.
    """

    def __init__(self, config: RehearsalConfig, rank: int, before: LossConsensus | None = None) -> None:
        good = None if before is None or before.guard is None else before.guard.good
        self.guard: ForgettingGuard | None = None if config.guard is None else ForgettingGuard(config.guard, rank, good)
        self.forgetting: Forgetting | None = Forgetting(config, rank) if config.follows_losses else None
        if before is not None:
            self.forgetting = before.forgetting
        self._rank, self._partitions = rank, PartitionLosses()
        self._sum = self._weight = self._measured = 0
        self._heard = 0  # measurements that the guard knows of

    @property
    def notes(self) -> Notes:
        """This rank's words in the next header; none that nobody would read."""
        losses = () if self.forgetting is None else self._partitions.words
        if self.guard is None:
            return Notes(losses=losses)
        return Notes(loss_sum=self._sum, loss_weight=self._weight, losses_measured=self._measured, losses=losses)

    @property
    def mixture(self) -> Mapping[str, float] | None:
        """The weights by partition that follow from the losses; None where they do not, or not yet."""
        return None if self.forgetting is None else self.forgetting.weights

    @property
    def loss_weight(self) -> float:
        """What a replayed row counts for in this step, beside its weights in the section."""
        return 1.0 if self.forgetting is None else self.forgetting.loss_weight

    @property
    def metrics(self) -> dict[str, float]:
        """What is known of the forgetting of each partition, by name; see `Rehearsal.metrics`."""
        return {} if self.forgetting is None else self.forgetting.metrics

    def steer(self, ratio: ReplayRatio) -> None:
        """Set the ratio of a queue that begins anew."""
        if self.forgetting is not None:
            self.forgetting.steer(ratio)

    @property
    def known(self) -> str:
        """What this rank knows of forgetting, for ranks that come later; empty where nothing follows the losses."""
        return "" if self.forgetting is None else json.dumps(self.forgetting.state_dict())

    def adopt(self, known: Sequence[str], ratio: ReplayRatio) -> None:
        """Take over what the rank knows that has heard most, from the `known` of all ranks."""
        self.go_on_from([json.loads(text) for text in known if text], ratio)

    def go_on_from(self, states: Sequence[Mapping[str, Any]], ratio: ReplayRatio) -> None:
        """Take over the state of the `Forgetting` that has heard most."""
        if self.forgetting is not None:
            self.forgetting.load_state_dict(max(states, key=lambda state: int(state["meter"]["heard"])))
            self.forgetting.steer(ratio)

    def report(self, total: float, weight: float, by_partition: Mapping[int, Tally] | None = None) -> None:
        """Tell the others, with the next header, what was measured in a step.

        Args:
            total: Sum of losses on replayed rows that the guard watches.
            weight: What it is divided by.
            by_partition: What was measured of each partition.
        """
        sound = math.isfinite(total) and abs(total) < LARGEST_LOSS
        scaled = (round(total * FIXED_POINT), round(weight * FIXED_POINT)) if sound else (0, NOT_FINITE)
        self._sum, self._weight = scaled
        self._measured += 1
        if self.forgetting is not None:
            self._partitions.add(by_partition or {})

    def hear(self, notes: IntArray, step: int, ratio: ReplayRatio, losses: IntArray | None = None) -> None:
        """Take in what all ranks measured.

        Args:
            notes: `[ranks, NOTES]` int64, from the last headers.
            step: Number of the next exchange.
            ratio: What the guard and the budget change.
            losses: `[ranks, places, 5]` int64, from headers that were not heard yet; no places where there were none.

        Raises:
            ForgettingError: The guard ends the job.
        """
        if self.forgetting is not None and losses is not None and losses.size:
            self._partitions.take_off(losses[self._rank])
            self.forgetting.hear(losses, ratio)
        if self.guard is not None:
            self._tell_guard(self.guard, notes, step, ratio)

    def state_dict(self) -> dict[str, Any]:
        """What was measured last, and what those remember who act on it."""
        guard = None if self.guard is None else self.guard.state_dict()
        state = {"words": [self._sum, self._weight, self._measured], "heard": self._heard, "guard": guard}
        if self.forgetting is None:
            return state
        return {**state, "forgetting": self.forgetting.state_dict(), "partitions": self._partitions.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._sum, self._weight, self._measured = (int(word) for word in state["words"])
        self._heard = int(state["heard"])
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])
        if self.forgetting is not None and "forgetting" in state:
            self.forgetting.load_state_dict(state["forgetting"])
            self._partitions.load_state_dict(state["partitions"])

    def _tell_guard(self, guard: ForgettingGuard, notes: IntArray, step: int, ratio: ReplayRatio) -> None:
        sums, weights, measured = (
            notes[:, word - Word.MIXTURE].astype(np.float64)
            for word in (Word.LOSS_SUM, Word.LOSS_WEIGHT, Word.LOSSES_MEASURED)
        )
        if int(measured.min()) <= self._heard:
            return
        self._heard = int(measured.min())
        finite = weights > 0
        if finite.any():
            guard.hear(float(sums.sum() / weights[finite].sum()), step, ratio)
        elif weights.min() == NOT_FINITE:
            guard.hear_nothing_finite(step)
