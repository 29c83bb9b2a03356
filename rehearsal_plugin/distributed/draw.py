"""The global draw: who sends how many rows to whom, told by each rank for itself alone, without a message.

Given how many rows every rank holds of every partition, how many rows every rank asks for, and a generator that all
ranks share, every asking rank gets a set of rows out of ALL ranks' rows, without replacement. A rank finds out what it
has to send and to receive, in time that grows with these rows, not with those of all ranks.

The rows of a partition lie in a circle, rank by rank. A few random places on it, all different, are the same for all
readers; each reader moves on from them by a shift of its own. Two places, 7 and 2, for three readers and the rows of
three ranks::

    owner      0 0 0 0   1 1 1 1   2 2 2 2        12 rows, so readers are shifted by 0, 4 and 8
    reader 0       b           a                  rows 7 and 2
    reader 1             b           a            rows 11 and 6
    reader 2         a               b            rows 3 and 10

To move around a circle is one to one. So the rows of every reader are a uniform sample without replacement of all rows.
Readers spread evenly over the owners: the rows that a step replays on all ranks together are a stratified sample. Which
of its rows an owner sends is its own choice, at random anew for every reader.

Uniform and balanced draws and mixtures differ in the rows that each partition gives, see `quotas`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rehearsal_plugin.core.arrays import Float64Array, IntArray, Mask
from rehearsal_plugin.distributed.quotas import Quotas, shifted_into
from rehearsal_plugin.distributed.without_replacement import choose

__all__ = ["Moves", "Numbers", "Plan", "draw", "draw_from_stream", "joined", "plan"]

KEYS_ON_DISK = {"draw_numbers": "turns"}  # where checkpoints have another name
NO_ROWS: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Numbers:
    """Sources of random numbers: `shared` in the same state on every rank, `own` in another one on each."""

    shared: np.random.Generator
    own: np.random.Generator


@dataclass(frozen=True)
class Moves:
    """The rows of a step that one rank sends or gets.

    Attributes:
        reader: `[sent]` int64, the rank that gets each row.
        draw_number: `[sent]` int64, which of the reader's independent draws gave it, from 0.
        partition: `[sent]` int64, its partition, as a column of the table of counts.
        index: `[sent]` int64, which of this rank's rows of that partition, from 0.
        owner: `[received]` int64, the rank that each row comes from.
        received_draw: `[received]` int64, which draw of this rank gave it.
        total: Rows that move over all ranks.
    """

    reader: IntArray
    draw_number: IntArray
    partition: IntArray
    index: IntArray
    owner: IntArray
    received_draw: IntArray
    total: int


@dataclass(frozen=True)
class Plan:
    """One rank's part of a draw.

    Attributes:
        partition: `[sent]` int64, the partition of each row that this rank sends, grouped by reader.
        index: `[sent]` int64, which of its rows of that partition.
        send_counts: `[ranks]` int64, rows for each.
        recv_counts: `[ranks]` int64, rows from each.
        draw_numbers: `[received]` int64, which draw gave each row that this rank receives, grouped by owner.
        moved: Rows that move between any two ranks or stay, over all; 0 means that nobody needs an exchange.
    """

    partition: IntArray
    index: IntArray
    send_counts: IntArray
    recv_counts: IntArray
    draw_numbers: IntArray
    moved: int

    def state_dict(self) -> dict[str, Any]:
        """The same as arrays and numbers."""
        return {KEYS_ON_DISK.get(name, name): value for name, value in vars(self).items()}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Plan:
        """What `state_dict` gave, or that of an earlier release, which had lists."""
        read = {name: state[KEYS_ON_DISK.get(name, name)] for name in cls.__dataclass_fields__}
        counts = {name: np.asarray(read[name], dtype=np.int64) for name in ("send_counts", "recv_counts")}
        return cls(**{**read, **counts})


def draw(
    counts: IntArray,
    requests: IntArray,
    rank: int,
    numbers: Numbers,
    draws: int = 1,
    weights: Float64Array | None = None,
) -> Moves:
    """Draw rows for every rank, and find those that concern one.

    Args:
        counts: `[ranks, partitions]` int64, rows stored.
        requests: `[ranks]` int64, rows asked for in each draw, or `[ranks, draws]`. Who asks for more than all ranks
            hold gets all.
        rank: Whose rows are found.
        numbers: Sources of random numbers.
        draws: Independent draws for every rank.
        weights: `[partitions]` float64, the shares of the partitions in every draw, in proportion; None for equal ones.
            What a partition has too few rows for goes to the others, and one of weight 0 gives none.

    Returns:
        The rows that `rank` sends and gets. No draw has a row twice; two draws, of one rank or of two, may have the
        same row.
    """
    totals = counts.sum(axis=0)
    if weights is not None:
        totals = np.where(weights > 0, totals, 0)
    wanted = _wanted(requests, draws, totals)
    total = int(wanted.sum())
    if not total:
        return _no_moves()
    quotas = Quotas(totals, weights, wanted, numbers.shared)
    partition, draw_number = _pairs(len(totals), draws)
    segment, place = choose(totals[partition], quotas.most[partition], numbers.shared)
    order = np.argsort(segment, kind="stable")
    places = Places(partition[segment[order]], draw_number[segment[order]], place[order], totals)
    owner, received_draw = places.received(rank, quotas, counts)
    reader, sent_draw, sent_partition = places.sent(rank, quotas, counts)
    return Moves(*_pick(reader, sent_draw, sent_partition, counts[rank], numbers.own), owner, received_draw, total)


class Places:
    """Places on the circles of partitions, in order of partition and draw: arrays `[n]` int64, and rows of each.

    Args:
        partition: That of each.
        draw_number: Which draw it is for.
        place: Where it is for reader 0.
        totals: `[partitions]` int64, the length of each circle.
    """

    def __init__(self, partition: IntArray, draw_number: IntArray, place: IntArray, totals: IntArray) -> None:
        self._partition, self._draw_number, self._place, self._totals = partition, draw_number, place, totals
        is_first = _first_of_runs(partition, draw_number)
        starts = np.flatnonzero(is_first)
        self._number = np.arange(len(place)) - starts[is_first.cumsum() - 1]  # of the places of a partition and draw

    def received(self, reader: int, quotas: Quotas, counts: IntArray) -> tuple[IntArray, IntArray]:
        """Owner and draw of each row that a reader gets, two arrays `[n]` int64."""
        gets = self._number < quotas.of(np.asarray(reader), self._draw_number, self._partition)
        partition, ranks = self._partition[gets], len(counts)
        width = np.maximum(self._totals[partition] // ranks, 1)
        item = (self._place[gets] + reader * width) % self._totals[partition]
        drawn, column = np.unique(partition, return_inverse=True)
        ends = np.cumsum(counts[:, drawn].T)  # one cell for each of these partitions and rank, rank by rank
        starts = np.concatenate(([0], ends))[:: len(counts)]
        owner = np.searchsorted(ends, starts[column] + item, side="right") % ranks
        return np.asarray(owner), self._draw_number[gets]

    def sent(self, owner: int, quotas: Quotas, counts: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Reader, draw and partition of each row that an owner sends, three arrays `[n]` int64."""
        begin, held = counts[:owner].sum(axis=0), counts[owner]
        mine = np.flatnonzero(held[self._partition])
        partition = self._partition[mine]
        hit, reader = shifted_into(
            begin[partition] - self._place[mine], held[partition], self._totals[partition], len(counts)
        )
        place = mine[hit]
        draw_number, partition = self._draw_number[place], self._partition[place]
        gets = self._number[place] < quotas.of(reader, draw_number, partition)
        return reader[gets], draw_number[gets], partition[gets]


def draw_from_stream(
    counts: IntArray, offers: IntArray, requests: IntArray, rank: int, numbers: Numbers, draws: int = 1
) -> Moves:
    """Draw rows so that every row that was ever offered to any rank has the same chance.

    Where the rows of a rank are a uniform sample of those it was offered, each stands for offered / stored of them. So
    a rank, or a partition of a rank, has a share in the draw in proportion to the rows that it was offered, and its
    rows share that equally. For example, two ranks that store 10 rows each, of 100 and 300 offered: of 4 rows wanted,
    the first gives 1 and the second 3 in the mean. What a rank has too few rows for goes to the others.

    Args:
        counts: `[ranks, partitions]` int64, rows stored, each cell a uniform sample of `offers`.
        offers: `[ranks, partitions]` int64, rows offered so far.
        requests: See `draw`.
        rank: See `draw`.
        numbers: See `draw`.
        draws: See `draw`.
    """
    cells, partitions = counts.ravel(), counts.shape[1]
    wanted = _wanted(requests, draws, cells)
    if not wanted.any():
        return _no_moves()
    quotas = Quotas(cells, np.maximum(offers.ravel(), cells).astype(np.float64), wanted, numbers.shared)
    cell, number = _pairs(len(cells), draws)
    rows = quotas.of(np.asarray(rank), number, cell)
    owner, received_draw = np.repeat(cell // max(1, partitions), rows), np.repeat(number, rows)
    own, number = _pairs(partitions, draws)
    entry, reader = quotas.candidates(rank * partitions + own, number)
    partition, number = own[entry], number[entry]
    rows = quotas.of(reader, number, rank * partitions + partition)
    reader, number, partition = (np.repeat(part, rows) for part in (reader, number, partition))
    sent = _pick(reader, number, partition, counts[rank], numbers.own)
    return Moves(*sent, owner, received_draw, int(wanted.sum()))


def joined(first: Moves, second: Moves) -> Moves:
    """The rows of both."""
    names = [name for name in Moves.__dataclass_fields__ if name != "total"]
    both = {name: np.concatenate((getattr(first, name), getattr(second, name))) for name in names}
    return Moves(**both, total=first.total + second.total)


def plan(moves: Moves, size: int) -> Plan:
    """What one of `size` ranks sends and receives, in the order of the messages."""
    # Sender and receiver sort alike, so that no row needs a label.
    outward = np.lexsort((moves.draw_number, moves.reader))
    inward = np.lexsort((moves.received_draw, moves.owner))
    return Plan(
        moves.partition[outward],
        moves.index[outward],
        np.bincount(moves.reader, minlength=size),
        np.bincount(moves.owner, minlength=size),
        moves.received_draw[inward],
        moves.total,
    )


def _pairs(strata: int, draws: int) -> tuple[IntArray, IntArray]:
    """Every stratum with every draw, two arrays `[strata * draws]` int64."""
    return np.repeat(np.arange(strata), draws), np.tile(np.arange(draws), strata)


def _wanted(requests: IntArray, draws: int, totals: IntArray) -> IntArray:
    """Rows that each draw of each reader gets, `[readers, draws]` int64."""
    readers = len(requests)
    return np.broadcast_to(requests.reshape(readers, -1), (readers, draws)).clip(max=totals.sum())


def _pick(
    reader: IntArray, draw_number: IntArray, partition: IntArray, held: IntArray, rng: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Choose which of its rows an owner sends, where reader, draw and partition of each are known, `[n]` int64 each.

    Returns:
        Reader, draw and partition again, in another order, and which of the owner's rows of that partition each is.
    """
    if not len(reader):
        return NO_ROWS, NO_ROWS, NO_ROWS, NO_ROWS
    order = np.lexsort((partition, draw_number, reader))
    columns = [column[order] for column in (reader, draw_number, partition)]
    first = np.flatnonzero(_first_of_runs(*columns))
    wanted = np.diff(first, append=len(reader))
    segment, index = choose(held[columns[2][first]], wanted, rng)
    reader, draw_number, partition = (column[first[segment]] for column in columns)
    return reader, draw_number, partition, index


def _first_of_runs(*columns: IntArray) -> Mask:
    """Where a run of equal rows of a table begins, `[n]` bool; `columns` `[n]` each."""
    is_first = np.ones(len(columns[0]), dtype=bool)
    is_first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return is_first


def _no_moves() -> Moves:
    return Moves(NO_ROWS, NO_ROWS, NO_ROWS, NO_ROWS, NO_ROWS, NO_ROWS, 0)
