"""Redistribution of a checkpoint's rows: the share of each new rank, and the choice where a share exceeds the capacity.

The rows of each file are shuffled, the files laid end to end, and every new rank takes an equal stretch of them. So a
rank reads as few files as possible, and its rows of a file are a uniform sample of that file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rehearsal_plugin.core.apportionment import fair_shares
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["FileRows", "Stretch", "deal_files", "deal_rows", "keep_rows"]


@dataclass(frozen=True)
class FileRows:
    """Rows in a file.

    Attributes:
        count: Their number.
        has_layout: Whether the file says what a row is, as it does from the first row on.
    """

    count: int
    has_layout: bool


@dataclass(frozen=True)
class Stretch:
    """Rows `start` to `stop - 1` of a file, in its shuffled order."""

    file: int
    start: int
    stop: int


def deal_rows(counts: Sequence[int], rank: int, size: int) -> list[Stretch]:
    """The stretches of one rank's share.

    Two files of 4 and 3 rows, laid end to end, for 3 ranks (the shares begin at 0, 7 // 3 and 14 // 3):

    >>> for rank in range(3):
    ...     print(deal_rows([4, 3], rank, 3))
    [Stretch(file=0, start=0, stop=2)]
    [Stretch(file=0, start=2, stop=4)]
    [Stretch(file=1, start=0, stop=3)]

    Args:
        counts: Rows in each file.
        rank: Rank that takes the share, from 0.
        size: Number of ranks; the shares differ by one row at most, and together they are all rows.
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


def deal_files(files: Sequence[FileRows], rank: int, size: int) -> list[Stretch]:
    """The stretches of one rank's share; an empty one where it gets no row, as it needs the layout all the same.

    >>> deal_files([FileRows(1, True)], 0, 2)
    [Stretch(file=0, start=0, stop=0)]

    Args:
        files: The rows in each file.
        rank: As for `deal_rows`.
        size: As for `deal_rows`.

    Returns:
        An empty list before the first row.
    """
    stretches = deal_rows([rows.count for rows in files], rank, size)
    return stretches or [Stretch(file, 0, 0) for file, rows in enumerate(files) if rows.has_layout][:1]


def keep_rows(owners: IntArray, capacity: int, *, equal: bool, rng: np.random.Generator) -> IntArray:
    """Choose the rows that stay where there are more than fit.

    Of 6 rows of partition 0 and 2 of partition 1, 4 stay: 3 and 1 in proportion, or 2 and 2 in equal shares.

    Rows are sorted by (partition, random number), so the first rows of each partition in that order are a uniform
    sample of it:

        owners                      0 0 1 0      quotas 2 and 1
        random numbers             .8 .1 .5 .3
        order                       1 3 0 2      partition 0 first
        rank within its partition   0 1 2 0      kept where below the quota: rows 1, 3 and 2

    Args:
        owners: `[n]` int64, the partition of each row, numbered from 0.
        capacity: Number of rows that stay.
        equal: Whether partitions get equal shares, instead of shares in proportion to their rows.
        rng: Source of random numbers; within a partition, every set of rows is equally likely.

    Returns:
        Indices of the rows that stay, `[min(n, capacity)]` int64, ascending.
    """
    if len(owners) <= capacity:
        return np.arange(len(owners))
    sizes = np.bincount(owners)
    quotas = fair_shares(sizes, capacity) if equal else _proportional(sizes, capacity)
    shuffled = np.lexsort((rng.random(len(owners)), owners))
    rank_in_partition = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(shuffled[rank_in_partition < quotas[owners[shuffled]]])


def _proportional(sizes: IntArray, total: int) -> IntArray:
    """Split `total` in proportion to `sizes`, the largest remainders rounded up."""
    quotas, remainders = np.divmod(sizes * total, sizes.sum())
    quotas[np.argsort(-remainders, kind="stable")[: total - int(quotas.sum())]] += 1
    return np.asarray(quotas)
