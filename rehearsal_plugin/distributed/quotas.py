"""How many rows of each stratum every reader gets, told for any reader alone.

A stratum is a partition, or a partition of one rank. The rows that a reader asks for are shared between strata, fairly
or by weight. Every reader gets the whole parts of the shares. What is left over goes to strata by systematic sampling
(Madow 1949): the fractions lie side by side on a line, in random order, and points at distances of 1 pick strata. The
first point of each reader is that of the reader before, moved on by 1 / readers. For example, two readers and the
fractions 0.5, 0.9 and 0.6, of which each gets 2::

    line      |--0.5--|-----0.9-----|---0.6---|
    reader 0      0.3          1.3                  strata 0 and 1
    reader 1             0.8          1.8           strata 1 and 2

The first point of all is random. So a share is exact in the mean for every reader, and over all readers it is nearly
exact in each step. A line is in units of 2^-40, so that all ranks see the same whole numbers.
"""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.core.apportionment import fair_level, weighted_shares
from rehearsal_plugin.core.arrays import Float64Array, IntArray

__all__ = ["UNIT", "Quotas", "Share", "shifted_into"]

UNIT = 1 << 40
"""Length of a line on which one stratum is picked."""


class Share:
    """How `wanted` rows are shared between strata, the same for all readers that want as many.

    Attributes:
        base: `[strata]` int64, rows that everyone gets.
        low: `[strata]` int64, where the fraction of each begins on the line.
        high: `[strata]` int64, where it ends; the longest line is `UNIT` times the rows that are left over.
    """

    def __init__(self, totals: IntArray, weights: Float64Array | None, wanted: int, rng: np.random.Generator) -> None:
        self.base, fractions = _split(totals, weights, wanted)
        self.low = np.zeros_like(totals)
        self.high = self.low.copy()
        left_over = np.flatnonzero(fractions)
        if len(left_over):
            order = rng.permutation(left_over)
            ends = fractions[order].cumsum()
            self.low[order], self.high[order] = ends - fractions[order], ends

    @property
    def most(self) -> IntArray:
        """The most rows of each stratum that a reader gets, `[strata]` int64."""
        return self.base + (self.high > self.low)


class Quotas:
    """The shares of all draws of a step.

    Args:
        totals: `[strata]` int64, rows stored.
        weights: `[strata]` float64, in proportion; None for equal shares.
        requests: `[readers, draws]` int64, rows asked for, at most all that are stored.
        rng: The same state on every rank.
    """

    def __init__(
        self, totals: IntArray, weights: Float64Array | None, requests: IntArray, rng: np.random.Generator
    ) -> None:
        self._requests = requests
        self._width = UNIT // len(requests)
        most = int(requests.max())
        self.wanted: list[int] = [most] if (requests == most).all() else np.unique(requests[requests > 0]).tolist()
        self.shares = [Share(totals, weights, wanted, rng) for wanted in self.wanted]
        self._first_points: IntArray = np.asarray(rng.integers(UNIT, size=requests.shape[1]))

    @property
    def most(self) -> IntArray:
        """The most rows of each stratum that any draw of a reader takes, `[strata]` int64."""
        return np.asarray(np.maximum.reduce([share.most for share in self.shares]))

    def of(self, reader: IntArray, draw_number: IntArray, stratum: IntArray) -> IntArray:
        """Rows of a stratum that a draw of a reader takes; arrays `[n]` int64, or broadcast to that."""
        reader, draw_number, stratum = np.broadcast_arrays(reader, draw_number, stratum)
        point = (self._first_points[draw_number] + reader * self._width) % UNIT
        requested, rows = self._requests[reader, draw_number], np.zeros(len(reader), dtype=np.int64)
        for wanted, share in zip(self.wanted, self.shares, strict=True):
            which = np.flatnonzero(requested == wanted)
            strata, points = stratum[which], point[which]
            picks = (share.high[strata] - points + UNIT - 1) // UNIT - (share.low[strata] - points + UNIT - 1) // UNIT
            rows[which] = share.base[strata] + picks
        return rows

    def candidates(self, stratum: IntArray, draw_number: IntArray) -> tuple[IntArray, IntArray]:
        """Who may get rows of strata `[n]` in draws `[n]`; `of` tells how many.

        Returns:
            Which of the n, and reader, of every pair; two arrays `[pairs]` int64.
        """
        readers, space = len(self._requests), np.full(len(stratum), UNIT)
        pairs = []
        for share in self.shares:
            length = np.where(share.base[stratum] > 0, UNIT, share.high[stratum] - share.low[stratum])
            entry, reader = shifted_into(share.low[stratum] - self._first_points[draw_number], length, space, readers)
            pairs.append(entry * readers + reader)
        entry, reader = np.divmod(pairs[0] if len(pairs) == 1 else np.unique(np.concatenate(pairs)), readers)
        return entry, reader


def shifted_into(begin: IntArray, length: IntArray, space: IntArray, readers: int) -> tuple[IntArray, IntArray]:
    """Which readers' shifts lie in intervals of circles, in time that grows with what is found.

    The shift of reader j is `j * max(1, space // readers)`, taken around the circle. For example, 4 readers and a
    circle of 12, with the shifts 0, 3, 6 and 9: the interval from 8 on, 5 long, goes over the end and has 9 and 0.

    Args:
        begin: `[n]` int64, where each interval begins, any whole number.
        length: `[n]` int64, at most `space`.
        space: `[n]` int64, the length of each circle.
        readers: How many.

    Returns:
        Number of the interval and reader of every hit, two arrays `[hits]` int64.
    """
    width, begin = np.maximum(space // readers, 1), begin % space
    times = (readers - 1) * width // space + 2  # an interval may go over the end, and shifts wind around small circles
    interval = np.repeat(np.arange(len(begin)), times)
    turn = np.arange(len(interval)) - (times.cumsum() - times)[interval] - 1
    begin, width = begin[interval] + turn * space[interval], width[interval]
    first = np.clip(-(-begin // width), 0, readers)
    stop = np.clip(-(-(begin + length[interval]) // width), 0, readers)
    counts = stop - first
    piece = np.repeat(np.arange(len(counts)), counts)
    reader = np.arange(len(piece)) - (counts.cumsum() - counts - first)[piece]
    return interval[piece], reader


def _split(totals: IntArray, weights: Float64Array | None, wanted: int) -> tuple[IntArray, IntArray]:
    """Whole parts `[strata]` of the shares of `wanted` rows, and fractions `[strata]` in units of `1 / UNIT`.

    For example, 5 rows of strata that hold 1, 10 and 10: base `[1, 2, 2]`, and none are left over. Of 4 rows the base
    is `[1, 1, 1]`, and one is left over, of which the second and the third stratum have half each.
    """
    none = np.zeros_like(totals)
    if wanted == totals.sum():
        return totals, none
    if len(totals) == 1:  # nothing to share out
        return np.full_like(totals, wanted), none
    if weights is None:
        level = fair_level(totals, wanted)
        base, roomy = np.minimum(totals, level), totals > level
        left_over = wanted - int(base.sum())
        return base, _whole_units(roomy.astype(np.float64) * left_over / max(1, int(roomy.sum())), left_over)
    base, fractions = none.copy(), np.zeros(len(totals))
    some = np.flatnonzero(totals)
    base[some], fractions[some] = weighted_shares(totals[some], weights[some], wanted)
    return base, _whole_units(fractions, wanted - int(base.sum()))


def _whole_units(fractions: Float64Array, left_over: int) -> IntArray:
    """Fractions in units of `1 / UNIT`, none above 1, with the sum `left_over`; rounding goes to the smallest ones."""
    units = np.minimum((fractions * UNIT).astype(np.int64), UNIT - 1)
    missing = left_over * UNIT - int(units.sum())
    if missing < 0:
        units[units.argmax()] += missing
    while missing > 0:
        smallest = np.where(units > 0, units, UNIT).argmin()
        given = min(missing, UNIT - int(units[smallest]))
        units[smallest] += given
        missing -= given
    return units
