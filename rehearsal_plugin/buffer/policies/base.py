"""What a policy is, and where it is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.config.registries import POLICIES, JudgedBy, RegisteredPolicy, SampleOf
from rehearsal_plugin.core.arrays import Float32Array, IntArray

__all__ = ["POLICIES", "Offer", "Policy", "last_writers", "register", "vacant"]


@dataclass(slots=True)
class Offer:
    """Rows that want to be stored, in the order of the stream.

    Attributes:
        owners: `[n]` int64, the partition number of each; zeros where rows are not partitioned.
        scores: `[n, width]` float32, the score or the features of each; None where rows have none.
    """

    owners: IntArray
    scores: Float32Array | None = None

    def __len__(self) -> int:
        return len(self.owners)


Policy: TypeAlias = Callable[[SlotIndex, Offer, np.random.Generator], IntArray]
"""`policy(slot_index, offer, rng) -> slots`.

The result `[n]` int64 is the slot of each offered row, -1 where it is not kept; no slot twice; new slots are
taken in order from `slot_index.count`. A policy changes nothing: the buffer records the outcome.
"""

FEW = 64
"""Slots of which a set is made faster than an order."""


def register(
    name: str,
    *,
    partitions: bool = False,
    judges: JudgedBy | None = None,
    newest: bool = False,
    sample_of: SampleOf | None = None,
) -> Callable[[Policy], Policy]:
    """Make a policy available as `rehearsal.buffer.policy`.

    Args:
        name: What the config calls it.
        partitions: Whether it needs `partition_by`.
        judges: What it needs of `score_by`: one score a row, features, or nothing.
        newest: Whether it keeps the newest rows, whatever the random numbers.
        sample_of: What its rows are a uniform sample of, which `sampling.weights: stream` asks for: all rows offered on
            a rank ("rank"), those of each partition ("partition"), or nothing.
    """
    return POLICIES.register(name, lambda policy: RegisteredPolicy(policy, partitions, judges, newest, sample_of))


def last_writers(slots: IntArray) -> IntArray:
    """Where several rows go to one slot, keep the last, as if they had been written one by one.

    Batches without such rows, the usual ones, are found by a set or by a sort and returned as they are. Else
    `np.unique` of the reversed slots has the index of the first of each, which is the last in the order of the batch.

    >>> last_writers(np.array([4, -1, 4])).tolist()
    [-1, -1, 4]
    """
    if len(slots) <= FEW:
        listed = slots.tolist()
        missing = len(listed) - len(set(listed))
        different = not missing or missing == listed.count(-1) - 1
    else:
        ordered = np.sort(slots)
        different = not np.count_nonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0))
    if different:
        return slots
    kept = np.flatnonzero(slots >= 0)[::-1]
    _, first = np.unique(slots[kept], return_index=True)
    result = np.full_like(slots, -1)
    result[kept[first]] = slots[kept[first]]
    return result


def vacant(freed: list[IntArray], count: int, needed: int) -> IntArray:
    """Slots for `needed` rows: those given up first, then unused ones from `count` on."""
    slots = np.concatenate(freed) if freed else np.empty(0, dtype=np.int64)
    unused = np.arange(count, count + needed - len(slots))
    return np.concatenate((slots, unused))
