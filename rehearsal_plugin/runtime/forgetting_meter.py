"""How far the loss on the replayed rows of each partition has risen.

The level of a partition is the mean over its last `window` replayed rows: plain until there were as many, then an
exponential average in which `n` rows move it by `n / window` of the way. Rows are the clock, not steps: a mean over few
rows is mostly noise, at any ratio. Its reference is the level when its replay began:

    a partition without new rows      the level of its first window / 2 rows, and that for good
    one of which new rows come        its lowest level as long as they come, as it is still being learnt

The rise is `level / reference - 1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from rehearsal_plugin.runtime.partition_losses import Tally

__all__ = ["ForgettingMeter", "Level"]

NEW_FOR = 100
"""Measurements after the last new rows of a partition for which it counts as one of which new rows come."""

MOST_PARTITIONS = 1024
"""Partitions that are followed; of more, those with fewest replayed rows are forgotten."""

TINY = 1e-12


@dataclass
class Level:
    """What is known of a partition.

    Attributes:
        mean: The level, in nats.
        rows: Replayed rows so far.
        reference: The level that rises are told against; None before there is one.
        new_at: Number of the last measurement with new rows; None for none.
    """

    mean: float = 0.0
    rows: int = 0
    reference: float | None = None
    new_at: int | None = None

    @property
    def rise(self) -> float | None:
        """By which part the level is above the reference; None without one."""
        if self.reference is None:
            return None
        return (self.mean - self.reference) / max(abs(self.reference), TINY)


class ForgettingMeter:
    """Levels of all partitions; hears what all ranks measured together, and so is the same on all of them.

    Args:
        window: Rows that a level is a mean over.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._levels: dict[int, Level] = {}
        self._heard = 0

    def hear(self, measured: Mapping[int, Tally]) -> None:
        """Take in a measurement, by partition key."""
        self._heard += 1
        for key, tally in measured.items():
            level = self._levels.setdefault(key, Level())
            if tally.new_rows:
                level.new_at = self._heard
            if tally.rows and tally.weight > 0:
                self._move(level, tally)
        if len(self._levels) > MOST_PARTITIONS:
            kept = sorted(self._levels.items(), key=lambda one: (-one[1].rows, one[0]))[:MOST_PARTITIONS]
            self._levels = dict(kept)

    @property
    def rises(self) -> dict[int, float]:
        """The rise of each partition that has a reference."""
        return {key: rise for key, level in self._levels.items() if (rise := level.rise) is not None}

    @property
    def worst(self) -> float | None:
        """The highest rise; None before there is one."""
        return max(self.rises.values(), default=None)

    @property
    def awaits_reference(self) -> bool:
        """Whether rows of a partition without new ones are replayed, of which there were too few for a reference."""
        return any(
            level.rows and level.reference is None and not self._is_new(level) for level in self._levels.values()
        )

    def state_dict(self) -> dict[str, Any]:
        """All levels, by partition."""
        return {"heard": self._heard, "levels": [[key, *astuple(level)] for key, level in self._levels.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._heard = int(state["heard"])
        self._levels = {key: Level(*level) for key, *level in state["levels"]}

    def _is_new(self, level: Level) -> bool:
        return level.new_at is not None and self._heard - level.new_at < NEW_FOR

    def _move(self, level: Level, tally: Tally) -> None:
        level.rows += tally.rows
        level.mean += min(1.0, tally.rows / min(level.rows, self._window)) * (tally.mean - level.mean)
        if 2 * level.rows < self._window:
            return
        if level.reference is None:
            level.reference = level.mean
        elif self._is_new(level):
            level.reference = min(level.reference, level.mean)
