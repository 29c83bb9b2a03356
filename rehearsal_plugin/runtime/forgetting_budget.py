"""Raises and lowers the ratio so that the loss on replayed rows rises by no more than a budget.

What is controlled is the effort, the ratio times what a replayed row counts for in the loss; `by` says which of the two
moves. A PI controller on the logarithm of the effort, with a clamped integral and a limited slew (Astrom and Hagglund,
"PID Controllers", 1995). With the gain P and the error `e = rise - budget`, a measurement of `n` replayed rows out of
a window of `w` sets

    integral  +=  P / 3 * e * n / w                  held where the sum is at a bound, so that it does not wind up
    wanted     =  integral + P * e
    level     moves towards wanted by at most RATE * n / w

It is stable as all its clocks are rows. The loss answers the ratio through the mean over the window, of which the
integral sees a third at a time. The three steps from a request to its rows are few beside those that a window takes.
The limit keeps the noise of a measurement of few rows from moving the ratio, and as it moves nothing but the level,
noise does not add up. For example, with a budget of 0.02, a window of 256 rows and 32 rows a measurement::

    rise              0.00     0.01     0.03     0.03
    wanted           0.050    0.073    0.166    0.169
    ratio            0.050    0.073    0.121    0.169         by at most e^0.5 a measurement

Until there is a reference the ratio is the highest: what was forgotten before it is known would never be missed. Then
it begins in the middle of the bounds, on the logarithmic scale.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rehearsal_plugin.config import RatioBudget
from rehearsal_plugin.runtime.forgetting_meter import ForgettingMeter
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

__all__ = ["ForgettingBudget"]

LOG = logging.getLogger(__name__)

PROPORTIONAL = 0.8
"""E-folds of the ratio for a rise by a whole budget; a budget is what a few e-folds of the ratio cost or save."""

HIGHEST_GAIN = 40.0
"""E-folds of the ratio for a rise of 1, a doubled loss, at most: a small budget is no reason to follow the noise."""

RATE = 4.0
"""E-folds of the ratio for each window of rows, at most."""

EXCEEDED = 1.5
"""Times the budget; a rise above it at the highest ratio is told."""


@dataclass(frozen=True)
class Split:
    """How an effort is split into a ratio and a weight: the weight is raised first, as it costs no new rows.

    Attributes:
        lowest_ratio: The ratio up to the highest weight.
        highest_ratio: That of the highest effort.
        highest_weight: The weight from which on the ratio is raised.
    """

    lowest_ratio: float
    highest_ratio: float
    highest_weight: float

    @property
    def low(self) -> float:
        """The least effort."""
        return self.lowest_ratio

    @property
    def high(self) -> float:
        """The highest effort."""
        return self.highest_ratio * self.highest_weight


EFFORTS: dict[str, Callable[[RatioBudget], Split]] = {
    "ratio": lambda config: Split(config.min, config.max, 1.0),
    "loss_weight": lambda config: Split(config.middle, config.middle, config.max_weight),
    "both": lambda config: Split(config.min, config.max, config.max_weight),
}


class ForgettingBudget:
    """Sets the ratio and the weight; does the same on all ranks, as what it hears is.

    Args:
        config: The budget and its bounds.
        rank: Which rank logs: 0.
    """

    def __init__(self, config: RatioBudget, rank: int) -> None:
        self._config, self._rank = config, rank
        self._split = EFFORTS[config.by](config)
        self._low, self._high = math.log(self._split.low), math.log(self._split.high)
        self._middle = (self._low + self._high) / 2
        self._gain = min(HIGHEST_GAIN, PROPORTIONAL / config.budget)
        self._level = self._middle  # logarithm of the effort
        self._integral: float | None = None  # None before there is a reference
        self._exceeded = False

    @property
    def ratio(self) -> float:
        """The ratio from the next step on."""
        return min(self._split.highest_ratio, max(self._split.lowest_ratio, math.exp(self._level) / self.loss_weight))

    @property
    def loss_weight(self) -> float:
        """What a replayed row counts for from the next step on."""
        return min(self._split.highest_weight, max(1.0, math.exp(self._level) / self._split.lowest_ratio))

    def hear(self, meter: ForgettingMeter, rows: int, ratio: ReplayRatio) -> None:
        """Take in a measurement of `rows` replayed rows, and set the ratio."""
        rise = meter.worst
        if rise is None:
            self._level = self._high if meter.awaits_reference else self._middle
        elif self._integral is None:
            self._level, self._integral = self._middle, self._middle - self._proportional(rise)
        elif rows:
            self._move(rise, min(1.0, rows / self._config.window))
            self._tell(rise)
        ratio.set(self.ratio)

    def state_dict(self) -> dict[str, Any]:
        """The ratio, and what it follows from."""
        return {"level": self._level, "integral": self._integral, "exceeded": self._exceeded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; where the bounds are others, the nearest ratio within them."""
        self._integral, self._exceeded = state["integral"], state["exceeded"]
        self._level = self._clamped(state["level"])

    def _clamped(self, level: float) -> float:
        return min(self._high, max(self._low, level))

    def _proportional(self, rise: float) -> float:
        return self._gain * (rise - self._config.budget)

    def _move(self, rise: float, share: float) -> None:
        assert self._integral is not None  # by `hear`
        proportional = self._proportional(rise)
        wanted = self._clamped(self._integral + proportional * (1 + share / 3))
        self._integral = wanted - proportional
        limit = RATE * share
        self._level += min(limit, max(-limit, wanted - self._level))

    def _tell(self, rise: float) -> None:
        """Say once, and again after it was met, that the highest ratio does not hold the budget."""
        if rise <= self._config.budget:
            self._exceeded = False
        elif self._level == self._high and rise > EXCEEDED * self._config.budget and not self._exceeded:
            self._exceeded = True
            if self._rank == 0:
                LOG.warning(
                    "the loss on replayed rows has risen by %.3g %%, more than the %.3g %% of rehearsal.ratio.budget, "
                    "with the ratio at its highest, %.3g, where a row counts for %.3g; give a higher "
                    "rehearsal.ratio.max, or a lower learning rate",
                    100 * rise,
                    100 * self._config.budget,
                    self.ratio,
                    self.loss_weight,
                )
