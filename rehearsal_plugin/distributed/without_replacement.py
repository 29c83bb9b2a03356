"""Uniform samples without replacement from many ranges at once, in few calls of numpy.

The ranges are the rows of partitions, once for every rank that asks: a draw for 1,024 ranks is one call. Ranges of
which few items are wanted are sampled by rejection, the others by a shuffle: the work grows with the items wanted.
"""

from __future__ import annotations

import numpy as np

from rehearsal_plugin.core.arrays import IntArray, Mask

__all__ = ["choose"]


def choose(sizes: IntArray, wanted: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Uniform samples without replacement from many ranges at once.

    For example, two items out of ranges of 5, 2 and 900 rows::

        sizes     [5, 2, 900]     crowded [no, yes, no]   (more than half of the range is asked for)
        wanted    [2, 2, 2]
        segments  [0, 0, 2, 2, 1, 1]
        items     [4, 1, 77, 803, 0, 1]

    Args:
        sizes: `[segments]` int64; segment s is the range 0 to `sizes[s] - 1`.
        wanted: `[segments]` int64, how many of each, `wanted <= sizes`.
        rng: Source of random numbers.

    Returns:
        Segment and item of every choice, two arrays `[sum(wanted)]` int64. Every subset of a segment has the
        same chance. Time and memory are O(sum(wanted)).
    """
    crowded = 2 * wanted > sizes
    sparse = _choose_few(sizes, np.where(crowded, 0, wanted), rng)
    if not crowded.any():
        return sparse
    dense = _choose_many(np.where(crowded, sizes, 0), wanted, rng)
    return np.concatenate((sparse[0], dense[0])), np.concatenate((sparse[1], dense[1]))


def _choose_few(sizes: IntArray, wanted: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Rejection sampling: draw with replacement, and redraw items that repeat; at most half of a range is asked for.

    Of two equal items the one at the later position is redrawn, whatever its value. So all items are treated alike and
    every subset is as likely as any other. For example, of a range of 9::

        drawn     [3, 7, 3, 5]
        again     [2]              position 2 repeats the 3
        redrawn   [3, 7, 8, 5]
    """
    segment = np.repeat(np.arange(len(sizes)), wanted)
    high = sizes[segment]
    item = _integers(high, rng)
    if wanted.max(initial=0) <= 1:
        return segment, item
    again = _repeats(segment, item, wanted)
    while len(again):
        item[again] = _integers(high[again], rng)
        again = _repeats(segment, item, wanted)
    return segment, item


def _choose_many(sizes: IntArray, wanted: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Shuffle whole ranges, and take the first items of each.

    A shuffle is a sort by random numbers. Segment, random number and item are packed into one int64, so that one plain
    sort keeps segments together, shuffles inside of them, and carries the item along::

        | segment | random | item |      high to low bits; for ranges of 3 and 2 rows:
             0       9217      1
             0       3344      2          sorted: (0, 3344, 2) (0, 8120, 0) (0, 9217, 1) (1, ...)
             0       8120      0          items of segment 0, in random order: 2, 0, 1

    The random number has all bits that segment and item leave of 63, so ties are rare; a sort of plain int64 gives the
    same order on every processor.
    """
    segment = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(segment)) - (np.cumsum(sizes) - sizes)[segment]
    low = int(sizes.max()).bit_length()
    middle = 63 - low - len(sizes).bit_length()
    shuffled = np.sort((segment << (middle + low)) + (rng.integers(1 << middle, size=len(segment)) << low) + place)
    first = place < wanted[segment]
    return segment[first], shuffled[first] & ((1 << low) - 1)


def _integers(high: IntArray, rng: np.random.Generator) -> IntArray:
    """A uniform integer below each of `high`; one bound for all is several times faster in numpy."""
    if len(high) and (high == high[0]).all():
        return rng.integers(0, high[0], len(high))
    return rng.integers(0, high)


def _repeats(segment: IntArray, item: IntArray, wanted: IntArray) -> IntArray:
    """Positions of items that stand earlier in their segment already: `[4, 6, 4]` in one segment gives `[2]`.

    Args:
        segment: `[n]` int64, ascending.
        item: `[n]` int64.
        wanted: `[segments]` int64, items of each.
    """
    doubtful = np.flatnonzero(_with_repeats(segment, item, wanted)[segment])
    order = np.lexsort((item[doubtful], segment[doubtful]))
    ordered, owner = item[doubtful][order], segment[doubtful][order]
    repeats: IntArray = doubtful[order[1:]][(ordered[1:] == ordered[:-1]) & (owner[1:] == owner[:-1])]
    return repeats


def _with_repeats(segment: IntArray, item: IntArray, wanted: IntArray) -> Mask:
    """Which segments may have an item twice, `[segments]` bool; arguments as of `_repeats`.

    Sorted, equal items stand side by side. Where all segments have the same number of items they are the rows of a
    matrix; else segment and item are one number, if it fits into an int64, and else every segment is doubtful.
    """
    if len(item) and len(item) == len(wanted) * wanted[0] and (wanted == wanted[0]).all():
        ordered = np.sort(item.reshape(len(wanted), wanted[0]), axis=1)
        return np.asarray((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    span = int(item.max(initial=0)) + 1
    if len(wanted) * span >= 1 << 63:
        return np.ones(len(wanted), dtype=bool)
    keys = np.sort(segment * span + item)
    doubtful = np.zeros(len(wanted), dtype=bool)
    doubtful[keys[1:][keys[1:] == keys[:-1]] // span] = True
    return doubtful
