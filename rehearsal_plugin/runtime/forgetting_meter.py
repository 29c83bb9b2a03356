"""How far the loss on the replayed rows of each partition has risen.

The level of a partition is the mean over its last `window` replayed rows: plain until there were as many, then an
exponential average in which `n` rows move it by `n / window` of the way. Rows are the clock, not steps: a mean over few
rows is mostly noise, at any ratio. Its reference is the level when its replay began:

    a partition without new rows      the level of its first window / 2 rows, and that for good
    one of which new rows come        its lowest level as long as they come, as it is still being learnt

The rise is `level / reference - 1`. A mixture by need goes by the rise since a partition's own best level instead. A
partition of which no row was replayed for long, as the buffer has none left, counts no more until one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from rehearsal_plugin.runtime.partition_losses import Tally

__all__ = ["ForgettingMeter", "Level"]

NEW_FOR = 100
"""Measurements after the last new rows of a partition for which it counts as one of which new rows come."""

SEEN_WITHIN = 8
"""Windows of replayed rows, of all partitions together, in which one has to be seen to count."""

MOST_PARTITIONS = 1024
"""Partitions that are followed; of more, those that were not seen for longest are forgotten."""

TINY = 1e-12


@dataclass
class Level:
    """What is known of a partition.

    Attributes:
        mean: The level, in nats.
        rows: Replayed rows so far.
        reference: The level that rises are told against; None before there is one.
        new_at: Number of the last measurement with new rows; None for none.
        seen_at: Replayed rows of all partitions until it was measured last.
        best: The lowest level, from the first reference on; None before.
        new_rows: New rows of a measurement, an exponential average over `NEW_FOR` of them.
    """

    mean: float = 0.0
    rows: int = 0
    reference: float | None = None
    new_at: int | None = None
    seen_at: int = 0
    best: float | None = None
    new_rows: float = 0.0

    def rise_above(self, level: float) -> float:
        """By which part the present level is above another one."""
        return (self.mean - level) / max(abs(level), TINY)


class ForgettingMeter:
    """Levels of all partitions; hears what all ranks measured together, and so is the same on all of them.

    Args:
        window: Rows that a level is a mean over.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._levels: dict[int, Level] = {}
        self._heard = self._rows = 0  # measurements, and replayed rows of all partitions in them

    def hear(self, measured: Mapping[int, Tally]) -> None:
        """Take in a measurement, by partition key."""
        self._heard += 1
        for key, tally in measured.items():
            level = self._levels.setdefault(key, Level())
            if tally.new_rows:
                level.new_at = self._heard
            if tally.rows and tally.weight > 0:
                self._rows += tally.rows
                self._move(level, tally)
        for key, tally in measured.items():
            if tally.rows or tally.new_rows:
                self._levels[key].seen_at = self._rows
        for key, level in self._levels.items():
            come = measured[key].new_rows if key in measured else 0
            level.new_rows += (come - level.new_rows) / NEW_FOR
        if len(self._levels) > MOST_PARTITIONS:
            kept = sorted(self._levels.items(), key=lambda one: (-one[1].seen_at, -one[1].rows, one[0]))
            self._levels = dict(kept[:MOST_PARTITIONS])

    @property
    def rises(self) -> dict[int, float]:
        """The rise of each partition that has a reference and was seen lately."""
        return {key: level.rise_above(level.reference) for key, level in self._known() if level.reference is not None}

    @property
    def rises_above_best(self) -> dict[int, float]:
        """The same above the best level of each."""
        return {key: level.rise_above(level.best) for key, level in self._known() if level.best is not None}

    @property
    def shares_of_new(self) -> dict[int, float]:
        """The share of each partition that was ever measured in the new rows of late."""
        total = sum(level.new_rows for level in self._levels.values())
        return {key: level.new_rows / total if total else 0.0 for key, level in self._levels.items()}

    @property
    def worst_partition(self) -> int | None:
        """The key of the partition that has risen most; None before there is one."""
        rises = self.rises
        return max(rises, key=lambda key: (rises[key], key), default=None)

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
        return {
            "heard": self._heard,
            "rows": self._rows,
            "levels": [[key, *astuple(level)] for key, level in self._levels.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._heard, self._rows = int(state["heard"]), int(state["rows"])
        self._levels = {key: Level(*level) for key, *level in state["levels"]}

    def _known(self) -> Iterator[tuple[int, Level]]:
        """Partitions with a reference that were seen lately."""
        since = self._rows - SEEN_WITHIN * self._window
        return ((key, one) for key, one in self._levels.items() if one.reference is not None and one.seen_at >= since)

    def _is_new(self, level: Level) -> bool:
        return level.new_at is not None and self._heard - level.new_at < NEW_FOR

    def _move(self, level: Level, tally: Tally) -> None:
        level.rows += tally.rows
        level.mean += min(1.0, tally.rows / min(level.rows, self._window)) * (tally.mean - level.mean)
        if 2 * level.rows < self._window:
            return
        level.best = level.mean if level.best is None else min(level.best, level.mean)
        if level.reference is None:
            level.reference = level.mean
        elif self._is_new(level):
            level.reference = min(level.reference, level.mean)
