"""What a checkpoint says of a job, and the rows in it, whatever buffer they came from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.checkpoint.format import VERSION, Content, Place, peek
from rehearsal_plugin.checkpoint.increments import read_whole
from rehearsal_plugin.checkpoint.layout_json import describe, restore
from rehearsal_plugin.checkpoint.lazy_rows import Packed
from rehearsal_plugin.checkpoint.reshard import Stretch, deal, keep
from rehearsal_plugin.checkpoint.state_tree import State, flatten, unflatten
from rehearsal_plugin.checkpoint.validation import LAST_STEP, Form, check_buffer, check_progress
from rehearsal_plugin.config.names import ROW_LOSS
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.errors import CheckpointError

__all__ = ["Record", "Rows", "Saved", "consistent", "dealt", "pack", "unpack"]


Saved: TypeAlias = tuple[Path, Place]
"""A folder, and one rank's file in it."""


@dataclass(frozen=True)
class Record:
    """One rank's checkpoint.

    Attributes:
        job: Settings that the state depends on, by name.
        layout: Of the rows; None where there were none yet.
        device: Type of the device on which batches lived.
        buffer: See `RehearsalBuffer.state_dict`; None where there was none yet.
        progress: Everything else that a run goes on from; None where the rows are all there is.
        digest: Alike on the ranks that saved together; 0 where that does not matter.
    """

    job: Mapping[str, Any]
    layout: RowLayout | None
    device: str
    buffer: State | None
    progress: State | None
    digest: int = 0


@dataclass(frozen=True)
class Rows:
    """Rows of one layout, from any number of files.

    Attributes:
        layout: Theirs.
        rows: Packed.
        written: `[n]` int64, the step in which each was admitted.
        origin: `[n]` int32, the rank on which it was.
        keys: `[n]` int64, the partition of each; zeros without partitions.
        seen: Rows offered for them, by partition key.
    """

    layout: RowLayout
    rows: Packed
    written: IntArray
    origin: NDArray[np.int32]
    keys: IntArray
    seen: Mapping[int, int]

    def select(self, index: IntArray) -> Rows:
        """Some of the rows, `index` `[m]` int64, with their share of what was offered."""
        keys, sizes = np.unique(self.keys, return_counts=True)
        have = dict(zip(keys.tolist(), sizes.tolist(), strict=True))
        keys, sizes = np.unique(self.keys[index], return_counts=True)
        left = dict(zip(keys.tolist(), sizes.tolist(), strict=True))
        seen = {key: _share(self.seen.get(key, 0), left.get(key, 0), size) for key, size in have.items()}
        gone = [key for key in self.seen if key not in have]  # other partitions have all the room, and yet they offered
        if gone and len(self.keys):
            seen[gone[0]] = _share(sum(self.seen[key] for key in gone), len(index), len(self.keys))
        return Rows(
            self.layout, self.rows.select(index), self.written[index], self.origin[index], self.keys[index], seen
        )

    def within(self, capacity: int, *, equal: bool, rng: np.random.Generator) -> Rows:
        """As many as there is room for, out of all that were offered; see `reshard.keep`."""
        if len(self.rows) <= capacity:
            return self
        _, owners = np.unique(self.keys, return_inverse=True)
        return replace(self.select(keep(owners, capacity, equal=equal, rng=rng)), seen=self.seen)

    def distinct(self) -> Rows:
        """The first of all rows with the same batch fields."""
        index = self.rows.distinct(self.layout.row_bytes - self.layout.state_bytes)
        return self if len(index) == len(self.rows) else self.select(index)

    def keyed(self, keys: IntArray) -> Rows:
        """The rows with other partition keys `[n]` int64; what was offered is shared as the rows are."""
        if np.array_equal(keys, self.keys):
            return self
        distinct, sizes = np.unique(keys, return_counts=True)
        offered = sum(self.seen.values())
        seen = {
            key: _share(offered, size, len(keys)) for key, size in zip(distinct.tolist(), sizes.tolist(), strict=True)
        }
        return replace(self, keys=keys, seen=seen)

    def buffer(self) -> dict[str, Any]:
        """The rows as the `state_dict` of a buffer that holds nothing else."""
        known = np.array(list(self.seen), dtype=np.int64)
        keys, numbers = np.unique(np.concatenate((self.keys, known)), return_inverse=True)
        numbers = numbers[: len(self.keys)]
        sizes = np.bincount(numbers, minlength=len(keys))
        offered = np.array([self.seen.get(key, 0) for key in keys.tolist()], dtype=np.int64)
        partitions = {
            "keys": keys,
            "seen": np.maximum(offered, sizes),
            "sizes": sizes,
            "members": np.argsort(numbers, kind="stable"),
        }
        seen = max(len(self.rows), sum(self.seen.values()))
        index = {"count": len(self.rows), "seen": seen, "partitions": partitions, "values": None}
        return {"rows": self.rows.tensor(), "written": self.written, "origin": self.origin, "calls": 0, "index": index}

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, the oldest first.

        Raises:
            CheckpointError: They have different fields.
        """
        layout = parts[0].layout
        for part in parts[1:]:
            if describe(part.layout) != describe(layout):
                raise CheckpointError(
                    f"rows with the fields {describe(part.layout)} cannot be put together with rows with the fields "
                    f"{describe(layout)}"
                )
        if len(parts) == 1 and (np.diff(parts[0].written) >= 0).all():
            return parts[0]
        written = np.concatenate([part.written for part in parts])
        order = np.argsort(written, kind="stable")
        seen: dict[int, int] = {}
        for part in parts:
            for key, offered in part.seen.items():
                seen[key] = seen.get(key, 0) + offered
        return cls(
            layout,
            Packed.joined([part.rows for part in parts]).select(order),
            written[order],
            np.concatenate([part.origin for part in parts])[order],
            np.concatenate([part.keys for part in parts])[order],
            seen,
        )

    @classmethod
    def of(cls, record: Record) -> Rows | None:
        """The rows of a checkpoint; None where there were none yet."""
        if record.layout is None or record.buffer is None:
            return None
        buffer, index = record.buffer, record.buffer["index"]
        rows, partitions = buffer["rows"], index["partitions"]
        keys, seen = np.zeros(len(rows), dtype=np.int64), {0: int(index["seen"])}
        if partitions is not None:
            keys[partitions["members"]] = np.repeat(partitions["keys"], partitions["sizes"])
            seen = dict(zip(partitions["keys"].tolist(), partitions["seen"].tolist(), strict=True))
        return cls(record.layout, Packed.of(rows), buffer["written"], buffer["origin"], keys, seen)


def pack(record: Record) -> Content:
    """A record as the content of a file."""
    plain, tensors = flatten({"buffer": record.buffer, "progress": record.progress})
    layout = None if record.layout is None else describe(record.layout)
    count = 0 if record.buffer is None else len(record.buffer["rows"])
    meta = {"version": VERSION, "job": dict(record.job), "layout": layout, "device": record.device}
    return Content({**meta, "digest": record.digest, "count": count, "state": plain}, tensors)


def unpack(folder: Path, place: Place) -> Record:
    """The record in a file.

    Raises:
        CheckpointError: The file cannot be read, or contradicts itself.
    """
    with consistent(folder / place.name):
        content = read_whole(folder, place)
        state, layout = unflatten(content.meta["state"], content.tensors), content.meta["layout"]
        record = Record(
            content.meta["job"],
            None if layout is None else restore(layout),
            str(content.meta["device"]),
            state["buffer"],
            state["progress"],
        )
        _check(record, place, content.meta["count"])
        return record


def dealt(files: Sequence[Saved], rank: int, size: int) -> Rows | None:
    """The rows that one of `size` ranks takes from checkpoints of any number of ranks; None where there are none.

    Raises:
        CheckpointError: A file cannot be read, or contradicts itself, or they have rows of different fields.
    """
    noted = [peek(*file) for file in files]
    counts = [_count(meta, *file) for meta, file in zip(noted, files, strict=True)]
    stretches = deal(counts, rank, size)
    if not stretches:  # too few rows for all ranks, or none at all; a rank without rows needs their layout too
        stretches = [Stretch(file, 0, 0) for file, meta in enumerate(noted) if meta.get("layout") is not None][:1]
    parts = [_taken(*files[one.file], one) for one in stretches]
    return Rows.joined(parts) if parts else None


def _share(offered: int, left: int, have: int) -> int:
    """Of what was offered for `have` rows, what `left` of them stand for, rounded."""
    return (2 * offered * left + have) // (2 * have)


def _count(meta: Mapping[str, Any], folder: Path, place: Place) -> int:
    count = meta.get("count")
    if type(count) is not int or count < 0:
        raise CheckpointError(f"{folder / place.name} says that it has {count!r} rows; give another checkpoint")
    return count


def _check(record: Record, place: Place, count: Any) -> None:
    """ValueError and the like where a record contradicts itself."""
    job, layout, buffer = record.job, record.layout, record.buffer
    if not isinstance(job, dict) or place.step > LAST_STEP or (layout is None) != (buffer is None):
        raise ValueError("no settings, no such step, or rows without a layout")
    stored = 0 if layout is None or buffer is None else check_buffer(buffer, layout.row_bytes)
    if count != stored:
        raise ValueError("it has not the rows that it says")
    if record.progress is None:
        return
    form = None
    if layout is not None:
        score = (
            None
            if job["score_by"] is None
            else layout.field(ROW_LOSS if job["score_by"] == "loss" else job["score_by"])
        )
        local = job["scope"] == "local"
        form = Form(
            row_bytes=layout.row_bytes,
            state_bytes=layout.state_bytes,
            ranks=1 if local else place.size,
            rank=0 if local else place.rank,
            draws=job["draws"],
            width=0 if score is None else math.prod(score.shape),
        )
    check_progress(record.progress, form, buffer, place.step)


def _taken(folder: Path, place: Place, stretch: Stretch) -> Rows:
    with consistent(folder / place.name):
        rows = Rows.of(unpack(folder, place))
        if rows is None or len(rows.rows) < stretch.stop:
            raise ValueError("it has fewer rows than it says")
        order = generator(0, Purpose.RESHARD, place.step, place.rank).permutation(len(rows.rows))
        return rows.select(np.sort(order[stretch.start : stretch.stop]))


@contextmanager
def consistent(path: Path) -> Iterator[None]:
    """Turn what a file with contradictions leads to into an error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} contradicts itself: {error!r}; give another checkpoint") from error
