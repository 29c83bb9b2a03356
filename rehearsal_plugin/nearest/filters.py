"""Which rows a search is for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rehearsal_plugin.shares import IntArray

__all__ = ["Mask", "Where"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Where:
    """Rows that meet all of these conditions; None sets none.

    Attributes:
        partitions: Keys of their partitions.
        origins: Ranks on which they were admitted.
        min_age: Steps since they were admitted, at least.
        max_age: The same, at most.
    """

    partitions: Collection[int] | None = None
    origins: Collection[int] | None = None
    min_age: int | None = None
    max_age: int | None = None

    def mask(self, keys: IntArray, origin: IntArray, written: IntArray, now: int) -> Mask | None:
        """Which rows `[n]` are meant; None for all.

        Args:
            keys: `[n]` int64, their partitions.
            origin: `[n]`, the ranks on which they were admitted.
            written: `[n]` int64, the steps in which they were.
            now: The present step.
        """
        conditions: list[Mask] = []
        if self.partitions is not None:
            conditions.append(np.isin(keys, list(self.partitions)))
        if self.origins is not None:
            conditions.append(np.isin(origin, list(self.origins)))
        if self.min_age is not None:
            conditions.append(now - written >= self.min_age)
        if self.max_age is not None:
            conditions.append(now - written <= self.max_age)
        return np.logical_and.reduce(conditions) if conditions else None

    def to_json(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        sets = {name: getattr(self, name) for name in ("partitions", "origins")}
        lists = {name: None if some is None else sorted(int(key) for key in some) for name, some in sets.items()}
        return {**lists, "min_age": self.min_age, "max_age": self.max_age}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Where:
        """What `to_json` gave."""
        return cls(**given)
