"""Conditions on the rows that a search may return."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import IntArray, Mask
from rehearsal_plugin.errors import BatchError

__all__ = ["Where", "whole_number"]


@dataclass(frozen=True)
class Where:
    """Rows that meet all of these conditions; None sets none.

    Attributes:
        partitions: Keys of their partitions.
        origins: Ranks on which they were admitted.
        min_age: Steps since they were admitted, at least.
        max_age: The same, at most.

    Raises:
        BatchError: They are no whole numbers.
    """

    partitions: Collection[int] | None = None
    origins: Collection[int] | None = None
    min_age: int | None = None
    max_age: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None:  # as plain numbers, which travel to other ranks
                several = name in ("partitions", "origins")
                object.__setattr__(self, name, _whole_numbers(value, name) if several else whole_number(value, name))

    def mask(self, keys: IntArray, origin: IntArray, written: IntArray, now: int) -> Mask | None:
        """Which rows `[n]` meet the conditions; None for all.

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
        """The conditions as a JSON object."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, conditions: Mapping[str, Any]) -> Where:
        """The inverse of `to_json`."""
        return cls(**conditions)


def whole_number(value: Any, name: str) -> int:
    """A whole number of any type as a plain one.

    Raises:
        BatchError: It is none.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise BatchError(f"{name} is {value!r}, which is no whole number; give one") from error


def _whole_numbers(values: Any, name: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({whole_number(value, name) for value in values}))
    except TypeError as error:
        raise BatchError(f"{name} is {values!r}; give a list of whole numbers") from error
