"""Losses on replayed rows by partition, summed on each rank until all ranks have heard of them.

A header has places for the partitions with most rows. What it told is taken off when it is heard, at the same exchange
on all ranks; the others wait for the next one. With two places and rows of three partitions::

    measured        waiting before      told              waiting after
    7:3 8:1 9:2     7:3 8:1 9:2         7:3 9:2           8:1
    7:1             7:1 8:1             7:1 8:1           -

Sums are whole numbers in units of 2^-20, so that all ranks add up the same, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import PARTITION_WORDS, PARTITIONS, PartitionWord

__all__ = ["FIXED_POINT", "LARGEST_LOSS", "PartitionLosses", "Tally", "totals"]

FIXED_POINT = 1 << 20
"""Losses travel as integers, in units of its reciprocal: their sum is the same on all ranks in any order."""

LARGEST_LOSS = 1e12
"""Of a sum of losses that is told; others count as not measured."""

MOST_WAITING = 1024
"""Partitions that wait to be told of; of more, those with fewest rows are left out."""


@dataclass(frozen=True)
class Tally:
    """What was measured of a partition.

    Attributes:
        sum: Of losses on replayed rows, in units of `1 / FIXED_POINT`.
        weight: What the sum is divided by, in the same units.
        rows: Replayed rows that it is of.
        new_rows: New rows of the partition.
    """

    sum: int = 0
    weight: int = 0
    rows: int = 0
    new_rows: int = 0

    @classmethod
    def measured(cls, total: float, weight: float, rows: int, new_rows: int) -> Tally:
        """That of a sum of losses; without the replayed rows where the sum is NaN, infinite or too large."""
        if not math.isfinite(total) or abs(total) >= LARGEST_LOSS:
            return cls(new_rows=new_rows)
        return cls(round(total * FIXED_POINT), round(weight * FIXED_POINT), rows, new_rows)

    def plus(self, other: Tally, times: int = 1) -> Tally:
        """The two together, or without the other at -1 times."""
        mine, others = astuple(self), astuple(other)
        return Tally(*(one + times * more for one, more in zip(mine, others, strict=True)))

    @property
    def mean(self) -> float:
        """The mean loss; only with a weight."""
        return self.sum / self.weight


class PartitionLosses:
    """What this rank has measured and not all ranks have heard."""

    def __init__(self) -> None:
        self._waiting: dict[int, Tally] = {}

    def add(self, measured: Mapping[int, Tally]) -> None:
        """Add the measurement of a step, by partition key."""
        for key, tally in measured.items():
            self._waiting[key] = self._waiting.get(key, Tally()).plus(tally)
        if len(self._waiting) > MOST_WAITING:
            self._waiting = dict(self._by_rows()[:MOST_WAITING])

    @property
    def words(self) -> tuple[int, ...]:
        """This rank's words in the next header."""
        told = [word for key, tally in self._by_rows()[:PARTITIONS] for word in (key, *astuple(tally))]
        return (*told, *[0] * (PARTITION_WORDS - len(told)))

    def take_off(self, told: IntArray) -> None:
        """What this rank told was heard: words `[places, 5]` int64."""
        for key, tally in _tallies(told):
            left = self._waiting.get(key, Tally()).plus(tally, -1)
            self._waiting[key] = left
            if not left.rows and not left.new_rows:
                del self._waiting[key]

    def state_dict(self) -> dict[str, Any]:
        """What waits, by partition."""
        return {"waiting": [[key, *astuple(tally)] for key, tally in self._waiting.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._waiting = {key: Tally(*words) for key, *words in state["waiting"]}

    def _by_rows(self) -> list[tuple[int, Tally]]:
        """All that waits, most replayed rows first."""
        return sorted(self._waiting.items(), key=lambda one: (-one[1].rows, -one[1].new_rows, one[0]))


def totals(words: IntArray) -> dict[int, Tally]:
    """What all ranks told, `[ranks, places, 5]` int64, by partition key."""
    sums: dict[int, Tally] = {}
    for key, tally in _tallies(words.reshape(-1, len(PartitionWord))):
        sums[key] = sums.get(key, Tally()).plus(tally)
    return sums


def _tallies(words: IntArray) -> list[tuple[int, Tally]]:
    used = np.flatnonzero(words[:, PartitionWord.ROWS] + words[:, PartitionWord.NEW_ROWS])
    return [(key, Tally(*rest)) for key, *rest in words[used].tolist()]
