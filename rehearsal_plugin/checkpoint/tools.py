"""Checkpoints without a job: inspect, reshard, merge and export them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.narrowing import narrowed, width_for
from rehearsal_plugin.buffer.rows.trimming import TrimmedRows
from rehearsal_plugin.buffer.storage import parts_of
from rehearsal_plugin.checkpoint.folders import checkpoint_folder
from rehearsal_plugin.checkpoint.format import RankFile, list_files, write_file
from rehearsal_plugin.checkpoint.record import (
    Record,
    RowSet,
    pack_record,
    rows_for_rank,
    unpack_record,
)
from rehearsal_plugin.checkpoint.saved_file import SavedFile, report_contradictions
from rehearsal_plugin.checkpoint.timeline import find_newest
from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.errors import CheckpointError

__all__ = ["export", "inspect", "reshard"]


def inspect(folder: Path) -> dict[str, Any]:
    """Summarise the newest checkpoint in a folder.

    Returns:
        `step`, `ranks`, `rows`, `bytes`, `row_bytes`, `sent_bytes` (of a row between ranks), `fields` and `state`
        (name, dtype, shape), `job` (settings),
        `whole` (whether a job can go on bit for bit), `rows_by_rank`, `rows_by_partition`, `offered_by_partition`,
        `rows_by_origin` (the rank on which a row was admitted), `age_steps` (quartiles of step - step of admission).

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read.
    """
    files = newest_files(folder)
    records = [unpack_record(*file) for file in files]
    parts = [_rows_of(record, *file) for record, file in zip(records, files, strict=True)]
    parts_with_rows, step = [part for part in parts if part is not None], files[0][1].step
    written = (
        np.concatenate([part.written for part in parts_with_rows]) if parts_with_rows else np.empty(0, dtype=np.int64)
    )
    offered: Counter[int] = Counter()
    for part in parts_with_rows:
        offered.update(part.offered)
    layout = parts_with_rows[0].layout if parts_with_rows else None
    quartiles = np.quantile(step - written, [0, 0.25, 0.5, 0.75, 1]).tolist() if len(written) else []
    return {
        "step": step,
        "ranks": len(files),
        "rows": len(written),
        "bytes": sum(part.rows.nbytes for part in parts_with_rows),
        "row_bytes": 0 if layout is None else layout.row_bytes,
        "sent_bytes": 0 if layout is None else _sent_bytes(layout, parts_with_rows),
        "fields": [] if layout is None else [(f.name, str(f.dtype), list(f.shape)) for f in layout.fields],
        "state": [] if layout is None else [(f.name, str(f.dtype), list(f.shape)) for f in layout.state],
        "job": dict(records[0].job),
        "whole": all(record.progress is not None for record in records),
        "rows_by_rank": [0 if part is None else len(part.rows) for part in parts],
        "rows_by_partition": _count_values([part.keys for part in parts_with_rows]),
        "offered_by_partition": dict(sorted(offered.items())),
        "rows_by_origin": _count_values([part.origin for part in parts_with_rows]),
        "age_steps": quartiles,
    }


def reshard(
    folders: Sequence[Path],
    out: Path,
    ranks: int,
    capacity: int | None = None,
    each: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> int:
    """Share out the rows of one or several checkpoints between `ranks` new files.

    A job of any number of ranks can load them. It gets the rows, without those that were on their way between ranks.

    Args:
        folders: Folders, of each the newest checkpoint; all have rows of the same fields.
        out: Folder of the new files.
        ranks: Number of new files.
        capacity: Largest number of rows in a file, partitions in proportion; None for all rows.
        each: Is given the ranks and gives them back one by one, as they are written: a place for a progress bar.

    Returns:
        Rows written.

    Raises:
        CheckpointError: There is no checkpoint, the fields differ, or a file cannot be read or written.
    """
    if out.resolve() in {folder.resolve() for folder in folders} or list_files(out):
        raise CheckpointError(f"{out} holds checkpoints already; give a new folder, so that nothing is lost")
    files = [file for folder in folders for file in newest_files(folder)]
    step, first = max(rank_file.step for _, rank_file in files), unpack_record(*files[0])
    total = 0
    for rank in each(range(ranks)):
        rows = rows_for_rank(files, rank, ranks)
        if rows is not None and capacity is not None:
            rng = generator(0, Purpose.RESHARD, step, rank)
            rows = rows.cut_to(capacity, equal=first.job.get("policy") == "balanced", rng=rng)
        layout, buffer = (None, None) if rows is None else (rows.layout, rows.buffer_state())
        write_file(out, RankFile(step, ranks, rank), pack_record(Record(first.job, layout, first.device, buffer, None)))
        total += 0 if rows is None else len(rows.rows)
    return total


def export(folder: Path, path: Path) -> int:
    """Write the rows of a checkpoint as columns: one tensor, or one Arrow column, a field.

    Args:
        folder: Folder of the checkpoint; the newest is taken.
        path: File to write; ends in `.safetensors`, or in `.arrow` (Arrow IPC, also called Feather; fields of several
            dimensions are lists of fixed length, and bfloat16 becomes float32). Rows of different length are padded to
            the longest of them. Beside the fields there are `rehearsal.step` and `rehearsal.rank`: when and where a row
            was admitted.

    Returns:
        Rows written.

    Raises:
        CheckpointError: There is no checkpoint or no row, the ending is another, or the file cannot be written.
        MissingDependencyError: Arrow is asked for and pyarrow is not installed.
    """
    rows = rows_for_rank(newest_files(folder), 0, 1)
    if rows is None or not len(rows.rows):
        raise CheckpointError(f"{folder} holds no rows yet, so there is nothing to export")
    if path.suffix not in (".safetensors", ".arrow"):
        raise CheckpointError(f"{path} ends in neither .safetensors nor .arrow, so it is not clear what to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(_named_columns(rows), path)
        else:
            _write_arrow(_named_columns(rows), path)
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}; make room, or give another file") from error
    return len(rows.rows)


def newest_files(folder: Path) -> list[SavedFile]:
    """The files of the newest checkpoint in a folder, by rank; see `checkpoint_folder`.

    Raises:
        CheckpointError: There is no checkpoint.
    """
    inner = checkpoint_folder(folder)
    files = find_newest(inner)
    if files is None:
        raise CheckpointError(
            f"{folder} has no rehearsal checkpoint (rehearsal-step*-rank*-of-*.safetensors), nor have the folders that "
            "'latest' or checkpoint-* name in it; give the folder of a checkpoint"
        )
    return [(inner, rank_file) for rank_file in files]


def _named_columns(rows: RowSet) -> dict[str, Tensor]:
    """The fields by name; recorded state with the name of a batch field is called `recorded.<name>`."""
    stored, columns = rows.rows.read_all(), dict[str, Tensor]()
    longest = max(1, int(stored.lengths.max())) if isinstance(stored, TrimmedRows) else None
    for part in parts_of(stored):
        for name, values in _views(rows.layout, stored[part], longest).items():
            if name not in columns:
                columns[name] = torch.empty((len(stored), *values.shape[1:]), dtype=values.dtype)
            columns[name][part] = values
    columns |= {"rehearsal.step": torch.from_numpy(rows.written), "rehearsal.rank": torch.from_numpy(rows.origin)}
    return {name: column.contiguous() for name, column in columns.items()}


def _views(layout: RowLayout, rows: Tensor, longest: int | None) -> dict[str, Tensor]:
    """The columns of rows `[n, row_bytes]`, padded ones of no more than `longest` positions."""
    views = layout.views(rows, longest)
    return views | {f"recorded.{f.name}" if f.name in views else f.name: f.view(rows) for f in layout.state}


def _rows_of(record: Record, folder: Path, rank_file: RankFile) -> RowSet | None:
    with report_contradictions(folder / rank_file.name):
        return RowSet.of(record)


def _sent_bytes(layout: RowLayout, parts: Sequence[RowSet]) -> int:
    """Bytes of a row on its way between ranks: as many positions as the longest row needs."""
    longest = [part.rows.longest for part in parts]
    known = [each for each in longest if each is not None]
    if layout.longest is None or len(known) < len(longest):
        return layout.row_bytes
    return narrowed(layout, width_for(max(known), layout.longest)).row_bytes


def _count_values(parts: Sequence[np.ndarray[Any, Any]]) -> dict[int, int]:
    if not parts:
        return {}
    keys, counts = np.unique(np.concatenate(parts), return_counts=True)
    return dict(zip(keys.tolist(), counts.tolist(), strict=True))


def _write_arrow(columns: dict[str, Tensor], path: Path) -> None:
    pa, feather = (
        optional_import(module, extra="arrow", hint="export to .safetensors")
        for module in ("pyarrow", "pyarrow.feather")
    )
    arrays = {}
    for name, column in columns.items():
        flat = (column.float() if column.dtype == torch.bfloat16 else column).numpy().reshape(-1)
        width = column[0].numel()
        arrays[name] = pa.array(flat) if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    feather.write_feather(pa.table(arrays), str(path), compression="uncompressed")
