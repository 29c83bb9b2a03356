"""The global draw: who sends which row to whom, computed alike on every rank without a message.

Given how many rows every rank holds of every partition, how many rows every rank asks for, and a generator
that all ranks share, `draw` picks for every asking rank a set of rows out of ALL ranks' rows, without
replacement, and `plan` cuts out what one rank has to send and to receive. The work grows with the rows asked
for, never with the rows stored.

Uniform and balanced draws and mixtures are one algorithm. Rows asked for are first shared between partitions,
fairly or by weight (odd ones go to partitions drawn at random), then every partition gives a uniform sample of its
rows. With all rows in one partition that is a uniform draw: every stored row of every rank has the same chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rehearsal_plugin.core.apportionment import fair_level, weighted_shares
from rehearsal_plugin.core.arrays import Float64Array, IntArray, Mask

__all__ = ["Draws", "Plan", "choose", "draw", "joined", "plan"]


@dataclass(frozen=True)
class Draws:
    """Every row that moves in a step; four arrays `[rows]` int64, and what they were drawn from.

    Attributes:
        reader: The rank that asked for the row.
        turn: Which of the reader's independent draws gave it, from 0.
        partition: Its partition, as a column of the table of counts.
        item: Which of the rows of that partition, counted through the ranks in order.
        counts: `[ranks, partitions]` int64, rows stored.
    """

    reader: IntArray
    turn: IntArray
    partition: IntArray
    item: IntArray
    counts: IntArray

    @cached_property
    def owner(self) -> IntArray:
        """The rank that holds each row."""
        return self._owners(self.partition, self.item)

    @cached_property
    def index(self) -> IntArray:
        """Which of the owner's rows of its partition each is, from 0."""
        before = np.cumsum(self.counts, axis=0) - self.counts
        return np.asarray(self.item - before[self.owner, self.partition])

    def sent(self, rank: int) -> tuple[IntArray, IntArray]:
        """The draws of rows that a rank holds, and which of its rows of their partition they are; two arrays `[n]`."""
        index = self.item - self.counts[:rank].sum(axis=0)[self.partition]
        sent = np.flatnonzero((index >= 0) & (index < self.counts[rank][self.partition]))
        return sent, index[sent]

    def received(self, rank: int) -> tuple[IntArray, IntArray]:
        """The draws of rows that a rank asked for, and who holds them; two arrays `[n]`."""
        received = np.flatnonzero(self.reader == rank)
        return received, self._owners(self.partition[received], self.item[received])

    def _owners(self, partition: IntArray, item: IntArray) -> IntArray:
        some, number = np.unique(partition, return_inverse=True)
        ends = np.cumsum(self.counts[:, some].T)  # one cell for each of these partitions and rank, rank by rank
        starts = np.concatenate(([0], ends))[:: len(self.counts)]
        cell = np.searchsorted(ends, starts[number] + item, side="right")
        return np.asarray(cell % len(self.counts))


@dataclass(frozen=True)
class Plan:
    """One rank's part of a draw.

    Attributes:
        partition: `[sent]` int64, the partition of each row that this rank sends, grouped by reader.
        index: `[sent]` int64, which of its rows of that partition.
        send_counts: Rows for each rank.
        recv_counts: Rows from each rank.
        turns: `[received]` int64, which draw gave each row that this rank receives, grouped by owner.
        moved: Rows that move between any two ranks or stay, over all; 0 means that nobody needs an exchange.
    """

    partition: IntArray
    index: IntArray
    send_counts: list[int]
    recv_counts: list[int]
    turns: IntArray
    moved: int


def draw(
    counts: IntArray,
    requests: IntArray,
    rng: np.random.Generator,
    turns: int = 1,
    weights: Float64Array | None = None,
) -> Draws:
    """Draw rows for every rank.

    Args:
        counts: `[ranks, partitions]` int64, rows stored.
        requests: `[ranks]` int64, rows asked for in each turn, or `[ranks, turns]`. Who asks for more than all ranks
            hold gets all.
        rng: The same state on every rank.
        turns: Independent draws for every rank.
        weights: `[partitions]` float64, the shares of the partitions in every draw, in proportion; None for equal ones.
            What a partition has too few rows for goes to the others, and one of weight 0 gives none.

    Returns:
        The rows of all ranks. No draw has a row twice; two draws, of one rank or of two, may have the same row.
    """
    totals = counts.sum(axis=0)
    if weights is not None:
        totals = np.where(weights > 0, totals, 0)
    wanted = np.broadcast_to(requests.reshape(len(counts), -1), (len(counts), turns)).ravel().clip(max=totals.sum())
    parts = [_quotas(totals, weights, int(n), np.flatnonzero(wanted == n), rng) for n in np.unique(wanted) if n]
    if not parts:
        none = np.empty(0, dtype=np.int64)
        return Draws(none, none, none, none, counts)
    drawer, partition, quota = (np.concatenate(column) for column in zip(*parts, strict=True))
    segment, item = choose(totals[partition], quota, rng)
    reader, turn = (drawer, np.zeros_like(drawer)) if turns == 1 else np.divmod(drawer, turns)
    return Draws(reader[segment], turn[segment], partition[segment], item, counts)


def joined(first: Draws, second: Draws) -> Draws:
    """The rows of both, which were drawn from the same counts."""
    names = ("reader", "turn", "partition", "item")
    both = {name: np.concatenate((getattr(first, name), getattr(second, name))) for name in names}
    return Draws(**both, counts=first.counts)


def plan(draws: Draws, rank: int, size: int) -> Plan:
    """What `rank` of `size` ranks sends and receives."""
    (sent, index), (received, owner) = draws.sent(rank), draws.received(rank)
    # Sender and receiver sort alike, so that no row needs a label.
    outward = np.lexsort((draws.turn[sent], draws.reader[sent]))
    sent, index = sent[outward], index[outward]
    inward = np.lexsort((draws.turn[received], owner))
    return Plan(
        draws.partition[sent],
        index,
        np.bincount(draws.reader[sent], minlength=size).tolist(),
        np.bincount(owner, minlength=size).tolist(),
        draws.turn[received[inward]],
        len(draws.item),
    )


def choose(sizes: IntArray, wanted: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Uniform samples without replacement from many ranges at once.

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
    """Draw with replacement and redraw whatever repeats: at most half of a range is ever asked for.

    Which of two equal items is redrawn depends on their positions, never on their values, so all items are
    treated alike and every subset is as likely as any other.
    """
    segment = np.repeat(np.arange(len(sizes)), wanted)
    high = sizes[segment]
    item = _integers(high, rng)
    again = _repeats(segment, item, wanted)
    while len(again):
        item[again] = _integers(high[again], rng)
        again = _repeats(segment, item, wanted)
    return segment, item


def _choose_many(sizes: IntArray, wanted: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Shuffle whole ranges and take the first of each.

    An item is sorted as one number, its segment before a random one before itself: of all ways to sort, that gives
    the same on every processor, and takes least.
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
    """Positions of items that stand earlier in their segment already.

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
    """Which segments may have an item twice, `[segments]` bool; arguments as of `_repeats`."""
    if len(item) and len(item) == len(wanted) * wanted[0] and (wanted == wanted[0]).all():
        ordered = np.sort(item.reshape(len(wanted), wanted[0]), axis=1)
        return np.asarray((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    span = int(item.max(initial=0)) + 1
    if len(wanted) * span >= 1 << 63:
        return np.ones(len(wanted), dtype=bool)
    keys = np.sort(segment * span + item)
    found = np.zeros(len(wanted), dtype=bool)
    found[keys[1:][keys[1:] == keys[:-1]] // span] = True
    return found


def _quotas(
    totals: IntArray, weights: Float64Array | None, wanted: int, readers: IntArray, rng: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray]:
    """Share `wanted` rows between partitions, for each of `readers`: (reader, partition, quota) entries."""
    if len(totals) == 1:  # nothing to share out
        return readers, np.zeros_like(readers), np.full_like(readers, wanted)
    if wanted == totals.sum():
        base, (reader, picked) = totals, 2 * (np.empty(0, dtype=np.int64),)
    elif weights is None:
        level = fair_level(totals, wanted)
        base, roomy = np.minimum(totals, level), np.flatnonzero(totals > level)
        odd = np.full(len(readers), wanted - int(base.sum()), dtype=np.int64)
        reader, picked = choose(np.full(len(readers), len(roomy), dtype=np.int64), odd, rng)
        picked = roomy[picked]
    else:
        base, fractions = np.zeros_like(totals), np.zeros(len(totals))
        some = np.flatnonzero(totals)
        base[some], fractions[some] = weighted_shares(totals[some], weights[some], wanted)
        reader, picked = _systematic(fractions, wanted - int(base.sum()), len(readers), rng)
    if not base.any():
        return readers[reader], picked, np.ones(len(reader), dtype=np.int64)
    quotas = np.tile(base, (len(readers), 1))
    quotas[reader, picked] += 1
    row, partition = np.nonzero(quotas)
    return readers[row], partition, quotas[row, partition]


def _systematic(
    fractions: Float64Array, count: int, readers: int, rng: np.random.Generator
) -> tuple[IntArray, IntArray]:
    """For each reader `count` different partitions, each with the chance that its fraction says.

    Systematic sampling (Madow 1949): the partitions, in random order, lie side by side on a line, each as long as its
    fraction, and are picked by points at equal distances from a random start.

    Args:
        fractions: `[partitions]` float64 below 1, with the sum `count`.
        count: How many.
        readers: For how many.
        rng: Source of random numbers.

    Returns:
        Reader and partition of every pick, two arrays `[readers * count]` int64.
    """
    order = rng.permutation(np.flatnonzero(fractions))
    if not count or not len(order):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    ends = np.cumsum(fractions[order])
    points = (rng.random((readers, 1)) + np.arange(count)) * (ends[-1] / count)
    places = np.searchsorted(ends, points.ravel(), side="right").clip(max=len(order) - 1)
    return np.repeat(np.arange(readers), count), order[places]
