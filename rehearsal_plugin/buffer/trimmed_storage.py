"""Rows of different length at slots, each with as many bytes as it has.

A capacity in bytes is then no number of rows: slots are made for many, and the buffer counts as full once its rows have
taken the bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.chunks import CHUNK_OPENERS, DEAD_SHARE, Chunks, NewChunk
from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.rows.fields import Field, put
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.runs import Runs
from rehearsal_plugin.buffer.rows.trimming import RowTrimmer, TrimmedRows
from rehearsal_plugin.buffer.storage import RowStorage, open_storage
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["TrimmedStorage", "open_rows", "slots_for"]

LOG = logging.getLogger(__name__)

CHUNK = 1 << 18
"""Bytes of a chunk, unless the rows are very long or the capacity is very small."""

ROWS_A_CHUNK = 16  # of the longest
LONGEST_LOG = 256  # entries
SHORTER, MEAN_POSITIONS = 16, 256
"""How many rows of the mean length, at most, take the place of one of the longest; of very long ones, those of a mean
length of so many positions."""

INDEX_SHARE = 8
"""Times the bytes of its index that a slot's part of a capacity has at least, so that most of them are left to rows."""

GROWN = 1.1
"""Times the bytes that they may have from which on rows that became longer are warned of."""

TABLE_BYTES = 16  # of a slot, for where its row lies

LEAST = 512
"""Bytes of a row from which on a slot is made for it, so that the table stays small beside the rows."""


def is_trimmed(config: BufferConfig, layout: RowLayout) -> bool:
    """Whether rows of a layout are stored without their padding."""
    return bool(layout.pads) and config.storage in CHUNK_OPENERS


def slots_for(config: BufferConfig, layout: RowLayout) -> int:
    """Slots of a buffer.

    Raises:
        ConfigError: The capacity cannot hold one row.
    """
    rows, budget = config.rows(layout.row_bytes), config.capacity_bytes
    if budget is None or not is_trimmed(config, layout):
        return rows
    shorter = max(SHORTER, (layout.longest or 0) // MEAN_POSITIONS)
    return max(rows, min(shorter * rows, budget // max(LEAST, INDEX_SHARE * index_bytes(config, layout))))


def index_bytes(config: BufferConfig, layout: RowLayout) -> int:
    """Bytes that a slot takes at most beside its row: its place, what is known of the row, and by what it is found."""
    width = KeysAndScores(layout, config).width
    return (
        TABLE_BYTES
        + 13  # step and rank of admission, and whether the row changed
        + (28 if config.partition_by is not None else 0)  # partition, place in it, and the lists of partitions
        + (21 if config.deduplicate else 0)  # see `ContentIndex`
        + (4 * width + 9 if width else 0)  # score, and the tree by which rows are drawn
    )


def open_rows(config: BufferConfig, layout: RowLayout, rank: int) -> RowStorage:
    """Make the storage that the config asks for, for rows of one length or of different ones.

    Raises:
        ConfigError: The capacity cannot hold one row.
        StorageError: The memory, the device or the disk space cannot be had.
    """
    capacity = slots_for(config, layout)
    if not is_trimmed(config, layout):
        return open_storage(config, capacity, layout.row_bytes, rank)
    most_bytes = config.capacity_bytes
    if most_bytes is not None:
        most_bytes -= capacity * (index_bytes(config, layout) - TABLE_BYTES)
    return TrimmedStorage(layout, capacity, CHUNK_OPENERS[config.storage](config, rank), most_bytes)


class TrimmedStorage:
    """A `RowStorage` whose rows are trimmed on their way in, and padded on their way out.

    One thread writes. Another may read rows that are not being written: a version number tells it whether the table
    that it looked at was being changed, as in a sequence lock, and the bytes themselves never change.

    Args:
        layout: Of the rows; its `pads` name the padded fields.
        capacity: Slots.
        new_chunk: Makes the memory.
        most_bytes: Of the rows and of all that is held for them; None where only the slots are limited.

    Attributes:
        budget: Tells when the bytes are used up; None where only the slots are limited.
        trimmer: Trims and pads its rows.
        longest: Positions of the longest row that was ever written.
    """

    device = torch.device("cpu")

    def __init__(self, layout: RowLayout, capacity: int, new_chunk: NewChunk, most_bytes: int | None = None) -> None:
        self.trimmer, self.row_bytes = RowTrimmer(layout), layout.row_bytes
        chunk = max(CHUNK, ROWS_A_CHUNK * self.row_bytes)
        self._chunks = Chunks(
            new_chunk, chunk if most_bytes is None else max(self.row_bytes, min(chunk, most_bytes // 16))
        )
        self._which = np.full(capacity, -1, dtype=np.int32)  # the chunk of each slot; -1 without a row
        self._starts = np.zeros(capacity, dtype=np.int64)
        self._lengths = np.zeros(capacity, dtype=np.int32)
        self._slots: dict[int, list[IntArray]] = {}  # that were ever written to each chunk
        self.longest = 0
        self._version = 0  # odd while the table is changed
        self.budget = None if most_bytes is None else Budget(self.trimmer, self._chunks, most_bytes - self._table_bytes)

    @property
    def live_bytes(self) -> int:
        """Bytes of the rows stored."""
        return self._chunks.live

    @property
    def held_bytes(self) -> int:
        """Bytes that are held for them: with those of rows that were replaced, and of the table."""
        return self._chunks.held + self._table_bytes

    @property
    def _table_bytes(self) -> int:
        return self._which.nbytes + self._starts.nbytes + self._lengths.nbytes

    def write(
        self, slots: IntArray, rows: Tensor, places: IntArray | None = None, bounds: IntArray | None = None
    ) -> None:
        """See `RowStorage.write`; `bounds` `[m]` tells from which position on each of the rows is padding."""
        array = np.ascontiguousarray(rows.numpy())
        if array.shape[1] != self.row_bytes:
            raise ValueError(f"rows of {array.shape[1]} bytes instead of {self.row_bytes}")
        places = np.arange(len(array)) if places is None else places
        lengths = self.trimmer.lengths(array, places, bounds)
        which, starts = self._chunks.append(self.trimmer.sizes(lengths))
        self.trimmer.trim(array, places, lengths, self._chunks.runs(which, starts))
        self._enter(slots, which, starts, lengths)
        self._clean()

    def write_fields(
        self, slots: IntArray, fields: Sequence[Field], columns: Sequence[Tensor], places: IntArray | None = None
    ) -> None:
        """See `RowStorage.write_fields`."""
        rows = np.zeros((len(slots), self.row_bytes), dtype=np.uint8)
        put(rows, np.arange(len(slots)), fields, columns, places)
        self.write(slots, torch.from_numpy(rows))

    def read(
        self, slots: IntArray, out: Tensor, bounds: IntArray | None = None, trimmer: RowTrimmer | None = None
    ) -> None:
        """See `RowStorage.read`.

        `bounds` `[n]` int64 tells from which position on each row of `out` is padding already, and is brought up to
        date; None where nobody knows. `trimmer` is as in `TrimmedRows.pad_into`.
        """
        self._rows_at(slots).pad_into(out, bounds, trimmer)

    def first(self, count: int) -> TrimmedRows:
        """The rows at slots 0 to `count - 1` as they are now, whatever is written later; no byte is copied."""
        return self._rows_at(np.arange(count))

    def copy(self, slots: IntArray) -> TrimmedRows:
        """See `RowStorage.copy`."""
        return self._rows_at(slots).copied()

    def _rows_at(self, slots: IntArray) -> TrimmedRows:
        while True:
            version = self._version
            arrays, which = self._chunks.arrays, self._which[slots].astype(np.int64)
            starts, lengths = self._starts[slots], self._lengths[slots].astype(np.int64)
            if version == self._version and not version % 2:
                return TrimmedRows(self.trimmer, Runs(arrays, which, starts), lengths)
            time.sleep(0)  # let the writer go on

    def _enter(self, slots: IntArray, which: IntArray, starts: IntArray, lengths: IntArray) -> None:
        """Note where the rows at `slots` `[n]` lie from now on."""
        replaced = slots[self._which[slots] >= 0]
        lost = self.trimmer.sizes(self._lengths[replaced].astype(np.int64))
        self._chunks.release(self._which[replaced].astype(np.int64), lost)
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        self._version += 1
        self._which[slots], self._starts[slots], self._lengths[slots] = which, starts, lengths
        self._version += 1
        first = which[0] if len(which) else 0
        for chunk in [int(first)] if (which == first).all() else np.unique(which).tolist():
            log = self._slots.setdefault(chunk, [])
            log.append(slots[which == chunk])
            if len(log) == LONGEST_LOG:
                log[:] = [np.concatenate(log)]

    def _clean(self) -> None:
        """Move the rows out of chunks with many dead bytes, and give these chunks back."""
        while (chunk := self._chunks.to_clean()) is not None:
            slots = np.unique(np.concatenate(self._slots.pop(chunk)))
            slots = slots[self._which[slots] == chunk]
            rows = self._rows_at(slots)
            which, starts = self._chunks.append(self.trimmer.sizes(rows.lengths))
            rows.copy_to(self._chunks.runs(which, starts))
            self._enter(slots, which, starts, rows.lengths)
            self._chunks.give_back(chunk)


class Budget:
    """The bytes that rows of different length may take.

    Args:
        trimmer: Of their layout.
        chunks: Where they lie.
        nbytes: Bytes of all chunks together.
    """

    def __init__(self, trimmer: RowTrimmer, chunks: Chunks, nbytes: int) -> None:
        self._trimmer, self._chunks = trimmer, chunks
        self._most = (nbytes - chunks.nbytes) / (1 + DEAD_SHARE)  # of the rows stored
        self._warned = False

    def is_used_up(self) -> bool:
        """Whether another row would need more; warns once where the rows stored have grown beyond it by a tenth."""
        if self._chunks.live > GROWN * self._most and not self._warned:
            self._warned = True
            LOG.warning(
                "the rehearsal buffer holds %.1f MiB of rows, and its capacity has room for %.1f: rows have become "
                "longer since it was full, and each took the place of one row; lower rehearsal.buffer.capacity, or "
                "give it as a number of rows",
                self._chunks.live / 2**20,
                self._most / 2**20,
            )
        return self._chunks.live >= self._most

    def rows_that_fit(self, parts: Iterable[Tensor]) -> int:
        """How many rows of the mean length of these, `[n, row_bytes]` uint8 each, use it up."""
        count, total = 0, 1
        for part in parts:
            lengths = self._trimmer.lengths(part.numpy(), np.arange(len(part)))
            count, total = count + len(part), total + int(self._trimmer.sizes(lengths).sum())
        return int(self._most * count / total)
