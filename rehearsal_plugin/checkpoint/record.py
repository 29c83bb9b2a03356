"""The record of one rank in a checkpoint file, and its rows apart from any buffer.

file  --unpack_record-->  Record  --RowSet.of-->  RowSet  --buffer_state-->  state of a new buffer
file  <--pack_record----  Record
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.trimming import TrimmedRows
from rehearsal_plugin.checkpoint.census_checks import place_in_group
from rehearsal_plugin.checkpoint.format import VERSION, Content, RankFile, Stamp
from rehearsal_plugin.checkpoint.increments import ROWS, read_checkpoint
from rehearsal_plugin.checkpoint.layout_json import layout_from_json, layout_to_json
from rehearsal_plugin.checkpoint.lazy_rows import LazyRows
from rehearsal_plugin.checkpoint.reshard import FileRows, Stretch, deal_files, keep_rows
from rehearsal_plugin.checkpoint.saved_file import SavedFile, report_contradictions, rows_in_file
from rehearsal_plugin.checkpoint.state_tree import State, flatten_state, unflatten_state
from rehearsal_plugin.checkpoint.validation import LAST_STEP, ExpectedState, check_buffer, check_progress
from rehearsal_plugin.config.names import ROW_LOSS
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.errors import CheckpointError

__all__ = [
    "Record",
    "RowSet",
    "pack_record",
    "rows_for_rank",
    "unpack_record",
]


@dataclass(frozen=True)
class Record:
    """One rank's checkpoint.

    Attributes:
        job: Settings that the state depends on, by name.
        layout: Layout of the rows; None before the first row.
        device: Type of the device of the batches.
        buffer: State of the buffer, see `RehearsalBuffer.state_dict`; None before the first row.
        progress: All other state that a job resumes from; None for rows without a job.
        digest: The same number on all ranks that saved together; 0 where that does not matter.
        run: The run that saves, see `timeline`; None for rows without a job.
    """

    job: Mapping[str, Any]
    layout: RowLayout | None
    device: str
    buffer: State | None
    progress: State | None
    digest: int = 0
    run: str | None = None


@dataclass(frozen=True)
class RowSet:
    """Rows of one layout, from any number of files.

    Attributes:
        layout: Layout of the rows.
        rows: The packed rows.
        written: `[n]` int64, the step in which each was admitted.
        origin: `[n]` int32, the rank on which each was admitted.
        keys: `[n]` int64, the partition of each; zeros without partitions.
        offered: Number of offered rows that they are a sample of, by partition key.
    """

    layout: RowLayout
    rows: LazyRows
    written: IntArray
    origin: NDArray[np.int32]
    keys: IntArray
    offered: Mapping[int, int]

    def select(self, index: IntArray) -> RowSet:
        """The rows at `index` `[m]` int64, with their share of the offered rows."""
        keys, sizes = np.unique(self.keys, return_counts=True)
        held = dict(zip(keys.tolist(), sizes.tolist(), strict=True))
        keys, sizes = np.unique(self.keys[index], return_counts=True)
        selected = dict(zip(keys.tolist(), sizes.tolist(), strict=True))
        offered = {
            key: _share_of_offered(self.offered.get(key, 0), selected.get(key, 0), size) for key, size in held.items()
        }
        gone = [key for key in self.offered if key not in held]  # all their room went to other partitions
        if gone and len(self.keys):
            offered[gone[0]] = _share_of_offered(sum(self.offered[key] for key in gone), len(index), len(self.keys))
        return RowSet(
            self.layout, self.rows.select(index), self.written[index], self.origin[index], self.keys[index], offered
        )

    def cut_to(self, capacity: int, *, equal: bool, rng: np.random.Generator) -> RowSet:
        """At most `capacity` of the rows, chosen by `keep_rows`; they stand for all that were offered."""
        if len(self.rows) <= capacity:
            return self
        _, owners = np.unique(self.keys, return_inverse=True)
        return replace(self.select(keep_rows(owners, capacity, equal=equal, rng=rng)), offered=self.offered)

    def without_duplicates(self) -> RowSet:
        """The rows without later ones that have the same batch fields."""
        index = self.rows.distinct(self.layout.row_bytes - self.layout.state_bytes)
        return self if len(index) == len(self.rows) else self.select(index)

    def with_keys(self, keys: IntArray) -> RowSet:
        """The rows with new partition keys `[n]` int64; the offered rows are split in proportion to the rows."""
        if np.array_equal(keys, self.keys):
            return self
        distinct, sizes = np.unique(keys, return_counts=True)
        total = sum(self.offered.values())
        offered = {
            key: _share_of_offered(total, size, len(keys))
            for key, size in zip(distinct.tolist(), sizes.tolist(), strict=True)
        }
        return replace(self, keys=keys, offered=offered)

    def buffer_state(self) -> dict[str, Any]:
        """The `state_dict` of a buffer that holds just these rows."""
        known = np.array(list(self.offered), dtype=np.int64)
        keys, numbers = np.unique(np.concatenate((self.keys, known)), return_inverse=True)
        numbers = numbers[: len(self.keys)]
        sizes = np.bincount(numbers, minlength=len(keys))
        counts = np.array([self.offered.get(key, 0) for key in keys.tolist()], dtype=np.int64)
        partitions = {
            "keys": keys,
            "seen": np.maximum(counts, sizes),
            "sizes": sizes,
            "members": np.argsort(numbers, kind="stable"),
        }
        offered = max(len(self.rows), sum(self.offered.values()))
        index = {"count": len(self.rows), "seen": offered, "partitions": partitions, "values": None}
        return {
            "rows": self.rows.read_all(),
            "written": self.written,
            "origin": self.origin,
            "calls": 0,
            "index": index,
        }

    @classmethod
    def joined(cls, parts: Sequence[RowSet]) -> RowSet:
        """The rows of all parts, oldest first.

        Raises:
            CheckpointError: The parts have different fields.
        """
        layout = parts[0].layout
        fields, *others = (layout_to_json(replace(part.layout, pads={})) for part in parts)
        for other in others:
            if other != fields:
                raise CheckpointError(
                    f"rows with the fields {other} cannot be put together with rows with the fields {fields}"
                )
        if len(parts) == 1 and (np.diff(parts[0].written) >= 0).all():
            return parts[0]
        written = np.concatenate([part.written for part in parts])
        order = np.argsort(written, kind="stable")
        offered: dict[int, int] = {}
        for part in parts:
            for key, count in part.offered.items():
                offered[key] = offered.get(key, 0) + count
        return cls(
            layout,
            LazyRows.joined([part.rows for part in parts]).select(order),
            written[order],
            np.concatenate([part.origin for part in parts])[order],
            np.concatenate([part.keys for part in parts])[order],
            offered,
        )

    @classmethod
    def of(cls, record: Record) -> RowSet | None:
        """The rows of a record; None before the first row."""
        if record.layout is None or record.buffer is None:
            return None
        buffer, index = record.buffer, record.buffer["index"]
        rows, partitions = buffer["rows"], index["partitions"]
        keys, offered = np.zeros(len(rows), dtype=np.int64), {0: int(index["seen"])}
        if partitions is not None:
            keys[partitions["members"]] = np.repeat(partitions["keys"], partitions["sizes"])
            offered = dict(zip(partitions["keys"].tolist(), partitions["seen"].tolist(), strict=True))
        return cls(record.layout, LazyRows.of(rows), buffer["written"], buffer["origin"], keys, offered)


def pack_record(record: Record) -> Content:
    """The content of a file for a record."""
    buffer, rows = record.buffer, {}
    if buffer is not None and isinstance(buffer["rows"], TrimmedRows):
        buffer, rows = {**buffer, "rows": None}, {ROWS: buffer["rows"]}
    plain, tensors = flatten_state({"buffer": buffer, "progress": record.progress})
    layout = None if record.layout is None else layout_to_json(record.layout)
    count = 0 if record.buffer is None else len(record.buffer["rows"])
    meta = {"version": VERSION, "job": dict(record.job), "layout": layout, "device": record.device}
    return Content({**meta, "digest": record.digest, "count": count, "state": plain}, tensors, Stamp(record.run), rows)


def unpack_record(folder: Path, rank_file: RankFile) -> Record:
    """Read and check the record in a file.

    Raises:
        CheckpointError: The file cannot be read, or contradicts itself.
    """
    with report_contradictions(folder / rank_file.name):
        content = read_checkpoint(folder, rank_file)
        state, layout = unflatten_state(content.meta["state"], content.tensors), content.meta["layout"]
        if content.rows:
            state["buffer"]["rows"] = content.rows[ROWS]
        record = Record(
            content.meta["job"],
            None if layout is None else layout_from_json(layout),
            str(content.meta["device"]),
            state["buffer"],
            state["progress"],
        )
        _check_record(record, rank_file, content.meta["count"])
        return record


def rows_for_rank(
    files: Sequence[SavedFile], rank: int, size: int, listed: Sequence[FileRows] | None = None
) -> RowSet | None:
    """Read the rows that one of `size` ranks takes from the files of any number of ranks; None before the first row.

    Args:
        files: The files; only those with rows of this rank are opened where `listed` tells what is in them.
        rank: The rank.
        size: Number of ranks.
        listed: The rows in each file; None reads all their headers.

    Raises:
        CheckpointError: A file cannot be read or contradicts itself, or the files have rows of different fields.
    """
    stretches = deal_files(listed or [rows_in_file(*file) for file in files], rank, size)
    parts = [_read_stretch(*files[stretch.file], stretch) for stretch in stretches]
    return RowSet.joined(parts) if parts else None


def _share_of_offered(offered: int, selected: int, held: int) -> int:
    """Number of the `offered` rows that `selected` of `held` rows stand for: their proportion, rounded half up."""
    return (2 * offered * selected + held) // (2 * held)


def _check_record(record: Record, rank_file: RankFile, count: Any) -> None:
    """Raise a ValueError, TypeError or LookupError if a record contradicts itself."""
    job, layout, buffer = record.job, record.layout, record.buffer
    if not isinstance(job, dict) or rank_file.step > LAST_STEP or (layout is None) != (buffer is None):
        raise ValueError("no settings, no such step, or rows without a layout")
    stored = 0 if layout is None or buffer is None else check_buffer(buffer, layout.row_bytes)
    if count != stored:
        raise ValueError("it has another number of rows than it says")
    if record.progress is None:
        return
    expected = None
    if layout is not None:
        name = ROW_LOSS if job["score_by"] == "loss" else job["score_by"]
        score = None if name is None else layout.field(name)
        rank, ranks = place_in_group(
            job["scope"], rank_file.rank, rank_file.size, record.progress["supply"]["pipeline"]
        )
        expected = ExpectedState(
            layout=layout,
            ranks=ranks,
            rank=rank,
            all_ranks=rank_file.size,
            draws=job["draws"],
            width=0 if score is None else math.prod(score.shape),
        )
    check_progress(record.progress, expected, buffer, rank_file.step)


def _read_stretch(folder: Path, rank_file: RankFile, stretch: Stretch) -> RowSet:
    with report_contradictions(folder / rank_file.name):
        rows = RowSet.of(unpack_record(folder, rank_file))
        if rows is None or len(rows.rows) < stretch.stop:
            raise ValueError("it has fewer rows than it says")
        order = generator(0, Purpose.RESHARD, rank_file.step, rank_file.rank).permutation(len(rows.rows))
        return rows.select(np.sort(order[stretch.start : stretch.stop]))
