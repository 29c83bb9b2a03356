"""Rows of a checkpoint for another number of ranks: who takes which, and which stay where there is no room for all.

The rows of each file are shuffled, the files laid end to end, and every new rank takes an equal stretch. So a rank
reads no more files than it has to, and what it takes of a file is a uniform sample of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rehearsal_plugin.core.apportionment import fair_shares
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["Stretch", "deal", "keep"]


@dataclass(frozen=True)
class Stretch:
    """Rows `start` to `stop - 1` of a file, in its shuffled order."""

    file: int
    start: int
    stop: int


def deal(counts: Sequence[int], rank: int, size: int) -> list[Stretch]:
    """What one rank takes.

    Args:
        counts: Rows in each file.
        rank: From 0.
        size: Ranks; their shares differ by one row at most, and together they are all rows.
    """
    total = sum(counts)
    first, last = rank * total // size, (rank + 1) * total // size
    stretches, begin = [], 0
    for file, count in enumerate(counts):
        start, stop = max(first - begin, 0), min(last - begin, count)
        if start < stop:
            stretches.append(Stretch(file, start, stop))
        begin += count
    return stretches


def keep(owners: IntArray, capacity: int, *, equal: bool, rng: np.random.Generator) -> IntArray:
    """Which rows stay, of more than there is room for.

    Args:
        owners: `[n]` int64, the partition of each row, numbered from 0.
        capacity: Rows that can stay.
        equal: Whether partitions get equal shares; otherwise they keep those that they have.
        rng: Source of random numbers; within a partition, every set of rows has the same chance.

    Returns:
        `[min(n, capacity)]` int64, ascending.
    """
    if len(owners) <= capacity:
        return np.arange(len(owners))
    sizes = np.bincount(owners)
    quotas = fair_shares(sizes, capacity) if equal else _proportional(sizes, capacity)
    shuffled = np.lexsort((rng.random(len(owners)), owners))
    place = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(shuffled[place < quotas[owners[shuffled]]])


def _proportional(sizes: IntArray, total: int) -> IntArray:
    """`total` in proportion to `sizes`, the largest remainders rounded up."""
    quotas, remainders = np.divmod(sizes * total, sizes.sum())
    quotas[np.argsort(-remainders, kind="stable")[: total - int(quotas.sum())]] += 1
    return np.asarray(quotas)
