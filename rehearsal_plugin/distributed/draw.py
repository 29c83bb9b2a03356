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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rehearsal_plugin.core.apportionment import fair_level, weighted_shares
from rehearsal_plugin.core.arrays import Float64Array, IntArray
from rehearsal_plugin.distributed.without_replacement import choose

__all__ = ["Draws", "Plan", "draw", "draw_from_stream", "joined", "plan"]

KEYS_ON_DISK = {"draw_numbers": "turns"}  # where checkpoints have another name


@dataclass(frozen=True)
class Draws:
    """Every row that moves in a step; four arrays `[rows]` int64, and what they were drawn from.

    Attributes:
        reader: The rank that asked for the row.
        draw_number: Which of the reader's independent draws gave it, from 0.
        partition: Its partition, as a column of the table of counts.
        item: Which of the rows of that partition, counted through the ranks in order.
        counts: `[ranks, partitions]` int64, rows stored.
    """

    reader: IntArray
    draw_number: IntArray
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
        draw_numbers: `[received]` int64, which draw gave each row that this rank receives, grouped by owner.
        moved: Rows that move between any two ranks or stay, over all; 0 means that nobody needs an exchange.
    """

    partition: IntArray
    index: IntArray
    send_counts: list[int]
    recv_counts: list[int]
    draw_numbers: IntArray
    moved: int

    def state_dict(self) -> dict[str, Any]:
        """The same as arrays and numbers."""
        return {KEYS_ON_DISK.get(name, name): value for name, value in vars(self).items()}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Plan:
        """What `state_dict` gave."""
        return cls(**{name: state[KEYS_ON_DISK.get(name, name)] for name in cls.__dataclass_fields__})


def draw(
    counts: IntArray,
    requests: IntArray,
    rng: np.random.Generator,
    draws: int = 1,
    weights: Float64Array | None = None,
) -> Draws:
    """Draw rows for every rank.

    Args:
        counts: `[ranks, partitions]` int64, rows stored.
        requests: `[ranks]` int64, rows asked for in each draw, or `[ranks, draws]`. Who asks for more than all ranks
            hold gets all.
        rng: The same state on every rank.
        draws: Independent draws for every rank.
        weights: `[partitions]` float64, the shares of the partitions in every draw, in proportion; None for equal ones.
            What a partition has too few rows for goes to the others, and one of weight 0 gives none.

    Returns:
        The rows of all ranks. No draw has a row twice; two draws, of one rank or of two, may have the same row.
    """
    totals = counts.sum(axis=0)
    if weights is not None:
        totals = np.where(weights > 0, totals, 0)
    return Draws(*_draw_from(totals, requests, rng, draws, weights), counts)


def draw_from_stream(
    counts: IntArray, offers: IntArray, requests: IntArray, rng: np.random.Generator, draws: int = 1
) -> Draws:
    """Draw rows so that every row that was ever offered to any rank has the same chance.

    Where the rows of a rank are a uniform sample of those it was offered, each stands for offered / stored of them. So
    a rank, or a partition of a rank, has a share in the draw in proportion to the rows that it was offered, and its
    rows share that equally. For example, two ranks that store 10 rows each, of 100 and 300 offered: of 4 rows wanted,
    the first gives 1 and the second 3 in the mean. What a rank has too few rows for goes to the others.

    Args:
        counts: `[ranks, partitions]` int64, rows stored, each cell a uniform sample of `offers`.
        offers: `[ranks, partitions]` int64, rows offered so far.
        requests: See `draw`.
        rng: See `draw`.
        draws: See `draw`.
    """
    cells = counts.ravel()
    weights = np.maximum(offers.ravel(), cells).astype(np.float64)
    reader, number, cell, item = _draw_from(cells, requests, rng, draws, weights)
    owner, partition = np.divmod(cell, counts.shape[1])
    before = np.cumsum(counts, axis=0) - counts
    return Draws(reader, number, partition, before[owner, partition] + item, counts)


def _draw_from(
    totals: IntArray, requests: IntArray, rng: np.random.Generator, draws: int, weights: Float64Array | None
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Draw rows out of strata `[strata]` of so many rows and such weights; other arguments as of `draw`.

    Returns:
        Reader, number of the draw, stratum, and which row of that: four arrays `[rows]` int64.
    """
    readers = len(requests)
    wanted = np.broadcast_to(requests.reshape(readers, -1), (readers, draws)).ravel().clip(max=totals.sum())
    parts = [_quotas(totals, weights, int(n), np.flatnonzero(wanted == n), rng) for n in np.unique(wanted) if n]
    if not parts:
        none = np.empty(0, dtype=np.int64)
        return none, none, none, none
    drawer, stratum, quota = (np.concatenate(column) for column in zip(*parts, strict=True))
    segment, item = choose(totals[stratum], quota, rng)
    reader, number = (drawer, np.zeros_like(drawer)) if draws == 1 else np.divmod(drawer, draws)
    return reader[segment], number[segment], stratum[segment], item


def joined(first: Draws, second: Draws) -> Draws:
    """The rows of both, which were drawn from the same counts."""
    names = ("reader", "draw_number", "partition", "item")
    both = {name: np.concatenate((getattr(first, name), getattr(second, name))) for name in names}
    return Draws(**both, counts=first.counts)


def plan(draws: Draws, rank: int, size: int) -> Plan:
    """What `rank` of `size` ranks sends and receives."""
    (sent, index), (received, owner) = draws.sent(rank), draws.received(rank)
    # Sender and receiver sort alike, so that no row needs a label.
    outward = np.lexsort((draws.draw_number[sent], draws.reader[sent]))
    sent, index = sent[outward], index[outward]
    inward = np.lexsort((draws.draw_number[received], owner))
    return Plan(
        draws.partition[sent],
        index,
        np.bincount(draws.reader[sent], minlength=size).tolist(),
        np.bincount(owner, minlength=size).tolist(),
        draws.draw_number[received[inward]],
        len(draws.item),
    )


def _quotas(
    totals: IntArray, weights: Float64Array | None, wanted: int, readers: IntArray, rng: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray]:
    """Share `wanted` rows between partitions, for each of `readers`: (reader, partition, quota) entries.

    Every reader gets the whole parts of the fair shares; the rows that are left over go to partitions drawn at random,
    for every reader anew. So shares are exact in the mean. For example, 5 rows of partitions that hold 1, 10 and 10::

        level 2    base    [1, 2, 2]     5 rows, none left over
        4 rows:    base    [1, 1, 1]     1 left over, for each reader to one of the partitions with room
        reader 0   quotas  [1, 2, 1]
        reader 1   quotas  [1, 1, 2]
    """
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
    fraction, and are picked by points at equal distances from a random start. A fraction is below 1, the distance, so
    no partition is picked twice. For example, fractions 0.5, 0.9 and 0.6, of which 2 are picked::

        line      |--0.5--|-----0.9-----|---0.6---|
        points         0.3          1.3              start 0.3, distance 1
        picked    0                1

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
