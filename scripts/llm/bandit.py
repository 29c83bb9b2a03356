"""A mixture of old languages by a bandit, beside `sampling.weights: forgetting`, through `Rehearsal.reweigh` alone.

EXP3 (Auer et al., "The nonstochastic multiarmed bandit problem", SIAM J. Comput. 2002): old languages are the arms, and
the reward of one is how far its loss has risen above its own best, as `forgetting` has it. With two arms, of which the
first has risen by 0.3 and had 3 of the 4 rows of a step::

    probability    0.6     0.4
    reward         0.3     0.1
    estimate       0.3 * (3 / 4) / 0.6 = 0.375     0.1 * (1 / 4) / 0.4 = 0.0625
    gains          grow by these; a probability goes by exp(rate * gain / arms)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from rehearsal_plugin.integrations.transformers.callback import RehearsalCallback
from rehearsal_plugin.runtime.forgetting import WINDOW
from rehearsal_plugin.runtime.forgetting_meter import ForgettingMeter
from rehearsal_plugin.runtime.partition_losses import Tally

__all__ = ["Bandit", "Exp3"]


class Exp3:
    """Probabilities of arms.

    Args:
        arms: Their keys.
        steps: After which it ends; tells the rate.
    """

    def __init__(self, arms: list[int], steps: int) -> None:
        count = len(arms)
        self.rate = min(1.0, math.sqrt(count * math.log(count) / ((math.e - 1) * steps)))
        self._gains = dict.fromkeys(arms, 0.0)

    @property
    def probabilities(self) -> dict[int, float]:
        """Of each arm."""
        count, most = len(self._gains), max(self._gains.values())
        weights = {arm: math.exp(self.rate * (gain - most) / count) for arm, gain in self._gains.items()}
        total = sum(weights.values())
        return {arm: (1 - self.rate) * weight / total + self.rate / count for arm, weight in weights.items()}

    def learn(self, rewards: Mapping[int, float], rows: Mapping[int, float]) -> None:
        """Take in the reward of each arm, of which a step had so many rows."""
        probabilities, total = self.probabilities, sum(rows.values())
        for arm, reward in rewards.items():
            if total:
                self._gains[arm] += reward * rows[arm] / total / probabilities[arm]


class Bandit(TrainerCallback):
    """Reweighs what is replayed after each step; comes behind the `RehearsalCallback`.

    Args:
        rehearsal: Of the same trainer, with `losses_every` 1 and weights by partition.
        arms: Keys of the old languages.
        steps: Optimizer steps.
    """

    def __init__(self, rehearsal: RehearsalCallback, arms: list[int], steps: int) -> None:
        self._rehearsal, self._arms = rehearsal, arms
        self._exp3, self._meter = Exp3(arms, steps), ForgettingMeter(WINDOW)
        self._before = torch.zeros(len(arms), dtype=torch.float64)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hear what all ranks measured in this step."""
        assert self._rehearsal.rehearsal is not None
        metrics = self._rehearsal.rehearsal.metrics()
        told = [
            [metrics.get(f"{name}/{arm}", 0.0) for arm in self._arms] for name in ("rows_replayed", "loss_replayed")
        ]
        replayed, losses = torch.tensor(told, dtype=torch.float64)
        rows, self._before = replayed - self._before, replayed
        sums = torch.stack((rows, rows * losses))
        dist.all_reduce(sums)
        rows_by_arm, losses_by_arm = (dict(zip(self._arms, line, strict=True)) for line in sums.tolist())
        self._meter.hear(
            {arm: Tally.measured(losses_by_arm[arm], rows, round(rows), 0) for arm, rows in rows_by_arm.items()}
        )
        rises = {arm: min(1.0, max(0.0, rise)) for arm, rise in self._meter.rises_above_best.items()}
        self._exp3.learn(rises, rows_by_arm)
        self._rehearsal.rehearsal.reweigh(self._exp3.probabilities)
