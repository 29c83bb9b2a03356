"""The state of a buffer, and how an empty one is filled: with that state, or with rows that other ranks admitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.row_records import RowRecords
from rehearsal_plugin.buffer.storage import StoredRows, parts_of
from rehearsal_plugin.core.arrays import IntArray, RankArray

__all__ = ["adopt_rows", "load_rows", "rows_state"]

WriteRows: TypeAlias = Callable[[IntArray, Tensor], None]
"""`write(slots [n], rows [n, row_bytes])` stores rows, such as `RehearsalBuffer.write`."""


def rows_state(records: RowRecords, rows: StoredRows, calls: int) -> dict[str, Any]:
    """The state of a buffer, as rows, tensors, arrays and numbers; views where possible.

    Args:
        records: Of the rows stored.
        rows: `[count, row_bytes]` uint8.
        calls: Calls of `offer` and `sample` so far, which key their random numbers.
    """
    every = slice(records.slot_index.count)
    return {
        "rows": rows,
        "written": records.admissions.steps(every),
        "origin": records.admissions.ranks(every),
        "calls": calls,
        "index": records.slot_index.state_dict(),
    }


def load_rows(records: RowRecords, state: Mapping[str, Any], row_bytes: int, write: WriteRows) -> None:
    """Take over what `RehearsalBuffer.state_dict` returned for a buffer of the same config.

    Args:
        records: Those of an empty buffer.
        state: As `state_dict` returned it.
        row_bytes: Bytes a row.
        write: Stores rows.

    Raises:
        ValueError: The state contradicts itself.
    """
    records.slot_index.load_state_dict(state["index"])
    rows, count = state["rows"], records.slot_index.count
    if rows.shape != (count, row_bytes):
        raise ValueError(f"rows of shape {tuple(rows.shape)} for {count} of {row_bytes} bytes")
    for slots, part in _with_slots(rows[part] for part in parts_of(rows)):
        _store_rows(records, slots, part, write)
    _note_admissions(records, state["written"], state["origin"])


def adopt_rows(
    records: RowRecords,
    keys_and_scores: KeysAndScores,
    parts: Iterable[Tensor],
    written: IntArray,
    origin: RankArray,
    offered: Mapping[int, int],
    write: WriteRows,
) -> None:
    """Store rows of other buffers in an empty one; see `RehearsalBuffer.adopt`.

    Raises:
        ValueError: There is not one step and one rank of admission for every row.
    """
    index = records.slot_index
    partitions = index.partitions
    for slots, rows in _with_slots(parts):
        keys, scores = keys_and_scores.of_rows(rows)
        owners = keys if partitions is None else partitions.number(keys)
        index.record(slots, owners, scores)
        _store_rows(records, slots, rows, write)
    # `record` has counted the stored rows as the only offers. The true number is larger, and policies go by it.
    index.offered = max(index.count, sum(offered.values()))
    if partitions is not None:
        by_partition = np.array([offered.get(key, 0) for key in partitions.keys.tolist()], dtype=np.int64)
        partitions.offered = np.maximum(by_partition, partitions.sizes)
    _note_admissions(records, written, origin)


def _with_slots(parts: Iterable[Tensor]) -> Iterator[tuple[IntArray, Tensor]]:
    """Each part `[n, row_bytes]` with its slots `[n]`: 0, 1, 2, ... through all parts."""
    start = 0
    for part in parts:
        yield np.arange(start, start + len(part)), part
        start += len(part)


def _store_rows(records: RowRecords, slots: IntArray, rows: Tensor, write: WriteRows) -> None:
    """Store rows `[n, row_bytes]` that the slot index has already."""
    records.note_contents(slots, rows)
    write(slots, rows)


def _note_admissions(records: RowRecords, written: IntArray, origin: RankArray) -> None:
    """Note step and rank of admission of all rows, `[rows]` each."""
    count = records.slot_index.count
    if len(written) != count:
        raise ValueError(f"{len(written)} steps of {count} rows")
    records.admissions.take_over(written, origin)
