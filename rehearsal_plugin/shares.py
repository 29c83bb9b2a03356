"""Fair integer shares: as equal as the limits allow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["IntArray", "fair_level", "fair_shares"]

IntArray = NDArray[np.int64]


def fair_level(limits: IntArray, total: int) -> int:
    """The largest level L for which `sum(min(limits, L)) <= total`.

    Args:
        limits: `[n]` int64, the most that each may have; not empty and `sum(limits) > total`.
        total: What there is to share.
    """
    ordered = np.sort(limits)
    below = np.cumsum(ordered) - ordered
    filled = below + ordered * np.arange(len(ordered), 0, -1)  # the sum when the level is ordered[i]
    first = int(np.searchsorted(filled, total, side="right"))
    return int((total - below[first]) // (len(ordered) - first))


def fair_shares(limits: IntArray, total: int) -> IntArray:
    """Split `total` into shares that are equal up to one, none above its limit.

    Args:
        limits: `[n]` int64, the most that each may have.
        total: What there is to share.

    Returns:
        `[n]` int64 with the sum `min(total, sum(limits))`. Odd ones go to the first that have room.
    """
    if total >= limits.sum():
        return limits.copy()
    level = fair_level(limits, total)
    shares = np.minimum(limits, level)
    odd = total - int(shares.sum())
    shares[np.flatnonzero(limits > level)[:odd]] += 1
    return shares
