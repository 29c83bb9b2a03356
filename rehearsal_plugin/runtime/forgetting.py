"""What follows from the losses on replayed rows of each partition: the ratio, and the mixture that is replayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.runtime.forgetting_budget import ForgettingBudget
from rehearsal_plugin.runtime.forgetting_meter import ForgettingMeter
from rehearsal_plugin.runtime.partition_losses import totals
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

__all__ = ["Forgetting", "weights_by_need"]

WINDOW = 128
"""Rows that a level is a mean over, where no budget says so. Domains that are forgotten rise by a tenth and more, so a
mean need be no finer. A larger window would leave a short job without a mixture."""

FLOOR = 0.1
"""Share of the rows that comes from all partitions alike, so that none is lost sight of."""

GRAIN = 64
"""A mean weight has as many whole parts: a mixture that hardly changes is not told anew."""


class Forgetting:
    """Hears what all ranks measured together, and so does the same on all of them at the same step.

    Args:
        config: The `rehearsal` section; see `RehearsalConfig.follows_losses`.
        rank: Which rank logs: 0.

    Attributes:
        weights: By partition key, for `sampling.weights: forgetting`; None before any is known.
    """

    def __init__(self, config: RehearsalConfig, rank: int) -> None:
        budget = config.ratio_budget
        self._meter = ForgettingMeter(WINDOW if budget is None else budget.window)
        self._budget = None if budget is None else ForgettingBudget(budget, rank)
        self._weighs = config.sampling.weights == "forgetting"
        self.weights: dict[str, float] | None = None

    def hear(self, words: IntArray, ratio: ReplayRatio) -> None:
        """Take in the losses by partition in the headers of all ranks, `[ranks, places, 5]` int64."""
        measured = totals(words)
        if not measured:
            return
        self._meter.hear(measured)
        if self._weighs:
            self.weights = weights_by_need(self._meter.rises_above_best, self._meter.shares_of_new) or self.weights
        if self._budget is not None:
            # The rows of the partition that counts: others tell nothing of it, however many they are.
            worst = measured.get(self._meter.worst_partition) if self._meter.worst_partition is not None else None
            self._budget.hear(self._meter, worst.rows if worst is not None and worst.weight > 0 else 0, ratio)

    def steer(self, ratio: ReplayRatio) -> None:
        """Set the ratio, where it is controlled."""
        if self._budget is not None:
            ratio.set(self._budget.ratio)

    @property
    def loss_weight(self) -> float:
        """What a replayed row counts for, beside its weights in the section."""
        return 1.0 if self._budget is None else self._budget.loss_weight

    @property
    def metrics(self) -> dict[str, float]:
        """The rise of each partition; ratio and weight where they are controlled."""
        rises = {f"forgetting/{key}": rise for key, rise in self._meter.rises.items()}
        if self._budget is None:
            return rises
        return {"ratio": self._budget.ratio, "loss_weight": self._budget.loss_weight, **rises}

    def state_dict(self) -> dict[str, Any]:
        """What was heard, and what follows from it."""
        budget = None if self._budget is None else self._budget.state_dict()
        return {"meter": self._meter.state_dict(), "budget": budget, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, also under a section that asks for less or for more of it."""
        self._meter.load_state_dict(state["meter"])
        if self._budget is not None and state["budget"] is not None:
            self._budget.load_state_dict(state["budget"])
        self.weights = state["weights"] if self._weighs else None


def weights_by_need(rises: Mapping[int, float], shares_of_new: Mapping[int, float]) -> dict[str, float]:
    """The share of each partition in what is replayed: by how far its loss has risen, and how little of it comes anew.

    For example, of four partitions two have risen, and only rows of the last one come::

        rise            0.00    0.02    0.06    0.01
        share of new    0       0       0       1
        need            0       1/4     3/4     0
        weight          0.03    0.26    0.71    0.004       nine tenths by need, one tenth alike

    A partition whose rise is not known yet counts for as much as all others in the mean, if no row of it comes anew.
    Empty where none has risen: the weights stay as they were.

    Args:
        rises: By partition key, of those whose loss is known.
        shares_of_new: By partition key, what part of the new rows is of it.
    """
    absence = {key: 1 - shares_of_new.get(key, 0.0) for key in (*rises, *shares_of_new)}
    needs = {key: absence[key] * max(0.0, rise) for key, rise in rises.items()}
    total, alike = sum(needs.values()), sum(absence.values())
    if not total:
        return {}
    shares = {
        key: (1 - FLOOR) * needs[key] / total + FLOOR * missing / alike if key in needs else missing / len(absence)
        for key, missing in absence.items()
    }
    grain = GRAIN * len(shares)
    return {str(key): max(1, round(grain * share)) / grain for key, share in shares.items()}
