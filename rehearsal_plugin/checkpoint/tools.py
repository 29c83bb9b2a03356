"""What can be done with checkpoints without a job: look into them, share them out anew, join and export them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rehearsal_plugin.checkpoint.format import Place, find_set, places, write
from rehearsal_plugin.checkpoint.record import Record, Rows, Saved, consistent, dealt, pack, unpack
from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.errors import CheckpointError

__all__ = ["export", "inspect", "reshard"]


def inspect(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint in a folder holds.

    Returns:
        `step`, `ranks`, `rows`, `bytes`, `row_bytes`, `fields` and `state` (name, dtype, shape), `job` (settings),
        `whole` (whether a job can go on bit for bit), `rows_by_rank`, `rows_by_partition`, `offered_by_partition`,
        `rows_by_origin` (the rank on which a row was admitted), `age_steps` (quartiles of step - step of admission).

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    files = files_of(folder)
    records = [unpack(*file) for file in files]
    parts = [_rows(record, *file) for record, file in zip(records, files, strict=True)]
    present, step = [part for part in parts if part is not None], files[0][1].step
    written = np.concatenate([part.written for part in present]) if present else np.empty(0, dtype=np.int64)
    offered: Counter[int] = Counter()
    for part in present:
        offered.update(part.seen)
    layout = present[0].layout if present else None
    row_bytes = 0 if layout is None else layout.row_bytes
    quartiles = np.quantile(step - written, [0, 0.25, 0.5, 0.75, 1]).tolist() if len(written) else []
    return {
        "step": step,
        "ranks": len(files),
        "rows": len(written),
        "bytes": len(written) * row_bytes,
        "row_bytes": row_bytes,
        "fields": [] if layout is None else [(f.name, str(f.dtype), list(f.shape)) for f in layout.fields],
        "state": [] if layout is None else [(f.name, str(f.dtype), list(f.shape)) for f in layout.state],
        "job": dict(records[0].job),
        "whole": all(record.progress is not None for record in records),
        "rows_by_rank": [0 if part is None else len(part.rows) for part in parts],
        "rows_by_partition": _counted([part.keys for part in present]),
        "offered_by_partition": dict(sorted(offered.items())),
        "rows_by_origin": _counted([part.origin for part in present]),
        "age_steps": quartiles,
    }


def reshard(folders: Sequence[Path], out: Path, ranks: int, capacity: int | None = None) -> int:
    """Share out the rows of one or several checkpoints between `ranks` new files.

    A job of any number of ranks can take them over; it goes on with the rows, not with what was on its way.

    Args:
        folders: Of each the newest checkpoint; all with rows of the same fields.
        out: Where the new files go.
        ranks: How many.
        capacity: Most rows of each, in the shares that the partitions have; None for all.

    Returns:
        Rows written.

    Raises:
        CheckpointError: There is no checkpoint, the fields differ, or a file cannot be read or written.
    """
    if out.resolve() in {folder.resolve() for folder in folders} or places(out):
        raise CheckpointError(f"{out} holds checkpoints already; give a new folder, so that nothing is lost")
    files = [file for folder in folders for file in files_of(folder)]
    step, first = max(place.step for _, place in files), unpack(*files[0])
    total = 0
    for rank in range(ranks):
        rows = dealt(files, rank, ranks)
        if rows is not None and capacity is not None:
            rng = generator(0, Purpose.RESHARD, step, rank)
            rows = rows.within(capacity, equal=first.job.get("policy") == "balanced", rng=rng)
        layout, buffer = (None, None) if rows is None else (rows.layout, rows.buffer())
        write(out, Place(step, ranks, rank), pack(Record(first.job, layout, first.device, buffer, None)))
        total += 0 if rows is None else len(rows.rows)
    return total


def export(folder: Path, path: Path) -> int:
    """Write the rows of a checkpoint as columns: one tensor, or one Arrow column, a field.

    Args:
        folder: Of the newest checkpoint in it.
        path: Ends in `.safetensors`, or in `.arrow` (Arrow IPC, also called Feather; fields of several dimensions
            are lists of fixed length, and bfloat16 becomes float32). Beside the fields there are `rehearsal.step`
            and `rehearsal.rank`: when and where a row was admitted.

    Returns:
        Rows written.

    Raises:
        CheckpointError: There is no checkpoint or no row, the ending is another, or the file cannot be written.
        MissingDependencyError: Arrow is asked for and pyarrow is not installed.
    """
    rows = dealt(files_of(folder), 0, 1)
    if rows is None or not len(rows.rows):
        raise CheckpointError(f"{folder} holds no rows yet, so there is nothing to export")
    if path.suffix not in (".safetensors", ".arrow"):
        raise CheckpointError(f"{path} ends in neither .safetensors nor .arrow, so it is not clear what to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(_columns(rows), path)
        else:
            _write_arrow(_columns(rows), path)
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}; make room, or give another file") from error
    return len(rows.rows)


def files_of(folder: Path) -> list[Saved]:
    """The files of the newest checkpoint in a folder, by rank.

    Raises:
        CheckpointError: There is none.
    """
    found = find_set(folder)
    if found is None:
        raise CheckpointError(f"{folder} has no rehearsal checkpoint (rehearsal-step*-rank*-of-*.safetensors)")
    return [(folder, place) for place in found]


def _columns(rows: Rows) -> dict[str, Tensor]:
    """The fields by name; what was recorded under the name of a batch field is called `recorded.<name>`."""
    layout, packed = rows.layout, rows.rows.tensor()
    columns = {field.name: field.view(packed) for field in layout.fields}
    columns |= {f"recorded.{f.name}" if f.name in columns else f.name: f.view(packed) for f in layout.state}
    columns |= {"rehearsal.step": torch.from_numpy(rows.written), "rehearsal.rank": torch.from_numpy(rows.origin)}
    return {name: column.contiguous() for name, column in columns.items()}


def _rows(record: Record, folder: Path, place: Place) -> Rows | None:
    with consistent(folder / place.name):
        return Rows.of(record)


def _counted(parts: Sequence[np.ndarray[Any, Any]]) -> dict[int, int]:
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
