"""Every word that ranks tell each other beside the rows: one table.

Where a rank may have something to tell (see `header_schedule`), every rank gathers one header of all ranks, int64 words
in this order:

| words | name | who writes it | who reads it |
|---|---|---|---|
| 1 | `FINGERPRINT` | `Exchange`: digest of row layout, seed and what draws go by | `Headers.check` |
| 1 | `STEP` | `Exchange`: number of the exchange | `Headers.check` |
| 1 | `REQUEST` | `ReplayQueue`: rows this rank asks for in each draw | `draw`, `NearestDraw` |
| 3 | `NUMERATOR`, `DENOMINATOR`, `CARRY` | `ReplayQueue`: what it asks for after that, see `request` | `HeaderRound` |
| 1 | `CHANGES` | `GlobalCounts`: pairs that it takes to tell what changed | `GlobalCounts` |
| 1 | `PROMISE` | `HeaderSchedule`: exchanges for which this rank will have nothing to tell | `HeaderSchedule` |
| 1 | `WIDTH` | `RowWidth`: positions that this rank's rows are packed with, at least | `RowWidth` |
| 1 | `MIXTURE` | `Mixture`: digest of the weights this rank wants | `Mixture` |
| 1 | `LOSS_SUM` | `LossConsensus`: sum of losses on replayed rows, fixed point | `LossConsensus` |
| 1 | `LOSS_WEIGHT` | `LossConsensus`: what that sum is divided by, fixed point | `LossConsensus` |
| 1 | `LOSSES_MEASURED` | `LossConsensus`: how often it has measured | `LossConsensus` |
| 2 x room | pairs of partition key and rows stored, see `global_counts` | `GlobalCounts` | `GlobalCounts` |
| 40 | losses by partition, see below | `LossConsensus` | `LossConsensus` |
| any | nearest draw, see below | `NearestDraw` | `NearestDraw` |
| any | opening, see below | `Opening` | `Opening` |

All ranks' headers are equally wide. `room` is 64 pairs in the first header, so that a rank with another config can say
so, then 1, or 8 where rows are drawn by partition, and twice as many for the weights `stream`. A rank with more changes
than that sends no pairs, is left out of one draw, and writes in `CHANGES` how many it takes; the next header has room
for them, on all ranks.

The losses by partition stand in headers of jobs that follow them (`ratio.budget`, `sampling.weights: forgetting`), and
in the one with the opening, which is equally wide on a rank with another config. There is room for 8 partitions:

| words | name | |
|---|---|---|
| 1 | `KEY` | of the partition |
| 1 | `SUM` | sum of losses on replayed rows since this rank last told of it, fixed point |
| 1 | `WEIGHT` | what that sum is divided by, fixed point |
| 1 | `ROWS` | replayed rows that it is of; 0 in a place without a partition |
| 1 | `NEW_ROWS` | new rows of the partition |

The words of the nearest draw (`sampling.weights: retrieved`) follow from the second step on:

| words | name | |
|---|---|---|
| 1 | `QUERIES` | new rows whose neighbours this rank looks for |
| 1 | `WANTED` | how many neighbours it wants to be told of |
| queries x width / 2 | | embeddings of these rows, two float32 in a word |
| sum of all ranks' `WANTED` | | similarities of the neighbours found here for the last queries of all, float64 bits |
| the same | | their slots, -1 for none |

The opening stands at the end of the first header that ranks exchange after a start, a load or a restart:

| words | name | |
|---|---|---|
| 1 | `RUN` | random number of this rank's run; all take that of rank 0 |
| keys of the section | `KEYS` | a digest of the value of each, in the order of the reference |

An elastic Horovod job reduces two more words with `max` when its ranks have changed, see `Progress`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import IntEnum

import numpy as np

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.errors import ExchangeError

__all__ = [
    "FIXED",
    "NOTES",
    "PARTITIONS",
    "PARTITION_WORDS",
    "WORD_BYTES",
    "Headers",
    "NearestWord",
    "Notes",
    "OpeningWord",
    "PartitionWord",
    "Progress",
    "Word",
    "compose",
]

WORD_BYTES = 8


class Word(IntEnum):
    """The words that every header begins with."""

    FINGERPRINT = 0
    STEP = 1
    REQUEST = 2
    NUMERATOR = 3
    DENOMINATOR = 4
    CARRY = 5
    CHANGES = 6
    PROMISE = 7
    WIDTH = 8
    MIXTURE = 9
    LOSS_SUM = 10
    LOSS_WEIGHT = 11
    LOSSES_MEASURED = 12


FIXED = len(Word)
"""Words of a header before its pairs."""

NOTES = FIXED - Word.MIXTURE
"""Words that the last header leaves behind for the layers above; they are in checkpoints."""


class PartitionWord(IntEnum):
    """The words of each partition in the losses by partition."""

    KEY = 0
    SUM = 1
    WEIGHT = 2
    ROWS = 3
    NEW_ROWS = 4


PARTITIONS = 8
"""Partitions that a header has losses of, at most."""

PARTITION_WORDS = PARTITIONS * len(PartitionWord)


class NearestWord(IntEnum):
    """The words that the nearest draw's part of a header begins with."""

    QUERIES = 0
    WANTED = 1


class OpeningWord(IntEnum):
    """The words that the opening begins with; there are as many `KEYS` as the section has."""

    RUN = 0
    KEYS = 1


class Progress(IntEnum):
    """What ranks of an elastic job agree on before they go on together."""

    STEP = 0
    TRANSPORTS_MADE = 1


@dataclass(frozen=True)
class Notes:
    """The words of the layers above; see the table.

    Attributes:
        losses: Those of the losses by partition; none where nobody follows them.
    """

    mixture: int = 0
    loss_sum: int = 0
    loss_weight: int = 0
    losses_measured: int = 0
    losses: tuple[int, ...] = ()

    @property
    def words(self) -> list[int]:
        """All of them in a row."""
        return [self.mixture, self.loss_sum, self.loss_weight, self.losses_measured, *self.losses]


def compose(
    fingerprint: int,
    step: int,
    request: Request,
    changes: int,
    promise: int,
    notes: Notes,
    pairs: IntArray,
    room: int,
    nearest: IntArray | None = None,
    opening: IntArray | None = None,
    width: int = 0,
) -> IntArray:
    """The header of this rank.

    Args:
        fingerprint: See the table, as for `step`, `request`, `changes`, `promise`, `width` and `notes`.
        step: Number of the exchange.
        request: Rows asked for, now and later.
        changes: Pairs that it takes to tell what changed.
        promise: Exchanges after this one without a header.
        notes: The words of the layers above.
        pairs: `[n, 2]` int64, partition key and rows stored; `n <= room`.
        room: Pairs that headers of this step have room for.
        nearest: The words of the nearest draw.
        opening: The words of the opening.
        width: Positions that rows are packed with, at least.

    Returns:
        `[FIXED + 2 * room + losses + len(nearest) + len(opening)]` int64.
    """
    header = np.zeros(FIXED + 2 * room, dtype=np.int64)
    header[:FIXED] = fingerprint, step, *astuple(request), changes, promise, width, *notes.words[:NOTES]
    header[FIXED : FIXED + pairs.size] = pairs.ravel()
    parts = [part for part in (header, _losses_of(notes, opening), nearest, opening) if part is not None]
    return header if len(parts) == 1 else np.concatenate(parts)


def _losses_of(notes: Notes, opening: IntArray | None) -> IntArray | None:
    """The losses by partition; zeros where a header has room for them and its rank has none."""
    if notes.losses:
        return np.array(notes.losses, dtype=np.int64)
    return None if opening is None else np.zeros(PARTITION_WORDS, dtype=np.int64)


class Headers:
    """The headers of all ranks.

    Args:
        words: `[ranks, words]` int64.
        room: Pairs that each has room for.
        opening: Words of the opening at their end.
        losses: Words of the losses by partition.
    """

    def __init__(self, words: IntArray, room: int, opening: int = 0, losses: int = 0) -> None:
        self._words, self._room, self._end = words, room, words.shape[1] - opening
        self._first_loss = FIXED + 2 * room
        self._first_nearest = self._first_loss + losses

    def of(self, word: Word) -> IntArray:
        """One word of every rank, `[ranks]` int64."""
        return self._words[:, word]

    @property
    def pairs(self) -> IntArray:
        """Partition keys and rows stored, `[ranks, room, 2]` int64; the first `CHANGES` of each rank count."""
        return self._words[:, FIXED : FIXED + 2 * self._room].reshape(len(self._words), self._room, 2)

    @property
    def nearest(self) -> IntArray:
        """The words of the nearest draw, `[ranks, words]` int64."""
        return self._words[:, self._first_nearest : self._end]

    @property
    def losses(self) -> IntArray:
        """The losses by partition, `[ranks, places, 5]` int64; no places where headers have none."""
        words = self._words[:, self._first_loss : self._first_nearest]
        return words.reshape(len(words), -1, len(PartitionWord)).copy()

    @property
    def opening(self) -> IntArray:
        """The words of the opening, `[ranks, words]` int64."""
        return self._words[:, self._end :]

    @property
    def notes(self) -> IntArray:
        """The words of the layers above, `[ranks, NOTES]` int64, from `MIXTURE` on."""
        return self._words[:, Word.MIXTURE : FIXED].copy()

    @property
    def rates(self) -> IntArray:
        """Numerator, denominator and carry of what each rank asks for later, `[3, ranks]` int64; see `request`."""
        return self._words[:, Word.NUMERATOR : Word.CARRY + 1].T.copy()

    def check(self, rank: int) -> None:
        """Refuse headers of ranks that are at odds with `rank`.

        Raises:
            ExchangeError: Another rank is at another step, or its rows differ in fields, dtypes or shapes.
        """
        for word, what, cure in (
            (
                Word.FINGERPRINT,
                "rows of other fields, dtypes or shapes, or another rehearsal.seed or sampling.weights",
                "give every rank batches of one form and the same config",
            ),
            (Word.STEP, "another step", "call update() equally often on every rank"),
        ):
            mine, step = self._words[rank, word], self.of(Word.STEP)
            others = np.flatnonzero(self.of(word) != mine)
            if len(others):
                other = int(others[0])
                raise ExchangeError(
                    f"rank {rank} is at step {step[rank]}; rank {other}, at step {step[other]}, has {what}; {cure}"
                )
