"""Fair integer shares: as equal as the limits allow.

Water-filling: vessels with capacities (the limits) are filled to one level, and a full one takes no more. With the
limits 1, 4, 6 and 8 to share, the level is 3:

    limit   1    4    6
    share   1    3    3     = 7; the 1 that is left over goes to the first that has room
"""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.core.arrays import Float64Array, IntArray

__all__ = ["fair_level", "fair_shares", "weighted_shares"]


def fair_level(limits: IntArray, total: int) -> int:
    """The largest level L for which `sum(min(limits, L)) <= total`.

    Args:
        limits: `[n]` int64, the most that each may have; not empty and `sum(limits) > total`.
        total: What there is to share.

    >>> fair_level(np.array([6, 1, 4]), 8)  # at level 1 all take 3, at level 4 they take 9
    3
    """
    ordered = np.sort(limits)
    below = np.cumsum(ordered) - ordered  # taken by all vessels smaller than the i-th
    filled = below + ordered * np.arange(len(ordered), 0, -1)  # taken by all when the level is ordered[i]; ascending
    first = int(np.searchsorted(filled, total, side="right"))
    return int((total - below[first]) // (len(ordered) - first))


def fair_shares(limits: IntArray, total: int) -> IntArray:
    """Split `total` into shares that are equal up to one, none above its limit.

    Args:
        limits: `[n]` int64, the most that each may have.
        total: What there is to share.

    Returns:
        `[n]` int64 with the sum `min(total, sum(limits))`. Odd ones go to the first that have room.

    >>> fair_shares(np.array([1, 4, 6]), 8).tolist()
    [1, 4, 3]
    """
    if total >= limits.sum():
        return limits.copy()
    level = fair_level(limits, total)
    shares = np.minimum(limits, level)
    odd = total - int(shares.sum())
    shares[np.flatnonzero(limits > level)[:odd]] += 1
    return shares


def weighted_shares(limits: IntArray, weights: Float64Array, total: int) -> tuple[IntArray, Float64Array]:
    """Split `total` in proportion to weights, none above its limit; what one cannot take goes to the others.

    Water-filling of vessels as wide as their weights: one is full at the level `limit / weight`. Those that are full at
    the final level get their limit, the others a fraction of the rest in proportion to their weights.

    Args:
        limits: `[n]` int64, the most that each may have.
        weights: `[n]` float64, above 0.
        total: What there is to share, less than `sum(limits)`.

    Returns:
        Whole parts `[n]` int64, and fractions `[n]` float64 from 0 to below 1 whose sum is what is left of `total`.

    >>> whole, fractions = weighted_shares(np.array([1, 9, 9]), np.array([1.0, 1.0, 2.0]), 11)
    >>> whole.tolist(), fractions.round(2).tolist()  # the first is full; 10 are split into 3.33 and 6.67
    ([1, 3, 6], [0.0, 0.33, 0.67])
    """
    order = np.argsort(limits / weights, kind="stable")  # who is full first comes first
    ordered, heavy = limits[order], weights[order]
    behind = np.cumsum(heavy[::-1])[::-1]  # weight of those that are not full yet
    filled = np.cumsum(ordered) - ordered + ordered / heavy * behind  # the sum when the i-th is just full
    first = int(np.searchsorted(filled, total, side="right"))
    left = total - int(ordered[:first].sum())
    exact = left * heavy[first:] / behind[first] if first < len(ordered) else np.empty(0)
    whole = ordered.copy()
    whole[first:] = np.minimum(np.floor(exact).astype(np.int64), ordered[first:])
    fractions = np.zeros(len(limits))
    fractions[first:] = np.where(whole[first:] < ordered[first:], exact - whole[first:], 0.0)
    back = np.argsort(order, kind="stable")
    return whole[back], np.clip(fractions[back], 0.0, np.nextafter(1.0, 0.0))
