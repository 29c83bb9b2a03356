"""Watches the loss on replayed rows, which rises when the model forgets."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

from rehearsal_plugin.config import GuardConfig
from rehearsal_plugin.errors import ForgettingError
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

__all__ = ["ForgettingGuard"]

LOG = logging.getLogger(__name__)


class ForgettingGuard:
    """Compares the mean loss of the last measurements with the lowest such mean so far.

    It hears what all ranks measured together, and so does the same on all of them at the same step. After it has
    raised the ratio it waits for as many new measurements as the mean is taken over.

    Args:
        config: The section `rehearsal.guard`.
        rank: Which rank logs: 0.
        good: The last checkpoint of which it is known that it is a good one.
    """

    def __init__(self, config: GuardConfig, rank: int, good: str | None = None) -> None:
        self._config, self._rank = config, rank
        self._window: deque[float] = deque(maxlen=config.window)
        self._best: float | None = None
        self._exceeded = False
        self._not_finite = 0  # measurements in a row that were NaN or infinite
        self._good = good
        self._pending: list[tuple[int, str]] = []  # checkpoints that no measurement has confirmed yet

    @property
    def good(self) -> str | None:
        """The last checkpoint whose model was measured to be within the bound; None for none."""
        return self._good

    def hear(self, loss: float, step: int, ratio: ReplayRatio) -> None:
        """Take in a measurement.

        Args:
            loss: Mean over the replayed rows of all ranks.
            step: Number of the next exchange: it was measured in the step before, on the model as that step found it.
            ratio: May be raised.

        Raises:
            ForgettingError: The loss is past the bound, and the job is to end.
        """
        self._not_finite = 0
        self._window.append(loss)
        if len(self._window) < self._config.window:
            return
        mean = sum(self._window) / len(self._window)
        self._best = mean if self._best is None else min(self._best, mean)
        before, rise = self._exceeded, (self._config.bound - 1) * abs(self._best)  # a loss may be below 0
        self._exceeded = mean - self._best > rise
        if self._exceeded:
            self._pending.clear()
            self._act(mean, step, ratio, again=before)
            return
        confirmed = [one for one in self._pending if one[0] < step]
        if confirmed:
            self._good = confirmed[-1][1]
            self._pending = self._pending[len(confirmed) :]

    def hear_nothing_finite(self, step: int) -> None:
        """Take in a measurement that was NaN or infinite wherever rows were replayed.

        Raises:
            ForgettingError: So was each of the last `window` ones, and the job is to end.
        """
        self._not_finite += 1
        if self._not_finite < self._config.window:
            return
        message = (
            f"the loss on replayed rows was NaN or infinite in each of the last {self._not_finite} measurements, up to "
            f"step {step} (rehearsal.guard)"
        )
        if self._config.action == "stop":
            raise self._end(message)
        if self._rank == 0 and self._not_finite == self._config.window:
            LOG.warning("%s; look for the first loss that is not finite", message)

    def saved(self, folder: str, step: int) -> None:
        """Note a checkpoint, saved or loaded between two steps; the loss of the next one tells whether it is good."""
        if not self._exceeded:
            self._pending.append((step, f"{folder}, step {step}"))

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        window, pending = list(self._window), [list(one) for one in self._pending]
        level = {"window": window, "best": self._best, "exceeded": self._exceeded, "good": self._good}
        broken = {"not_finite": self._not_finite} if self._not_finite else {}
        return {**level, "pending": pending, **broken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._window = deque(state["window"], maxlen=self._config.window)
        self._best, self._exceeded, self._good = state["best"], state["exceeded"], state["good"]
        self._pending = [(int(step), str(name)) for step, name in state["pending"]]
        self._not_finite = int(state.get("not_finite", 0))

    def _end(self, message: str) -> ForgettingError:
        good = "none was saved" if self._good is None else self._good
        return ForgettingError(f"{message}; the last checkpoint from before: {good}")

    def _act(self, mean: float, step: int, ratio: ReplayRatio, *, again: bool) -> None:
        """Do what the config says; what was done already is not said twice."""
        message = (
            f"the loss on replayed rows is {mean:.4g} at step {step}, more than {self._config.bound:g} times its "
            f"lowest mean of {self._best:.4g} (rehearsal.guard)"
        )
        if self._config.action == "stop":
            raise self._end(message)
        if self._config.action == "raise_ratio":
            self._window.clear()
            before = ratio.ratio
            ratio.boost(self._config.factor, self._config.most)
            ratio.go_by(step)
            again = again and ratio.ratio == before
            message = f"{message}; the ratio is {ratio.ratio:.4g} from here on"
        if self._rank == 0 and not again:
            LOG.warning("%s", message)
