"""Rows of a checkpoint in a buffer, without a job."""

from __future__ import annotations

from pathlib import Path

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.checkpoint.format import read_header
from rehearsal_plugin.checkpoint.record import rows_for_rank
from rehearsal_plugin.checkpoint.tools import newest_files
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.errors import CheckpointError

__all__ = ["stored_rows"]


def stored_rows(folder: Path, rank: int = 0, size: int = 1) -> tuple[RehearsalBuffer, int]:
    """Load this rank's share of the newest checkpoint in a folder, saved by any number of ranks.

    Args:
        folder: Folder that all ranks can see.
        rank: This rank, from 0.
        size: Number of ranks that share the rows.

    Returns:
        A buffer, and the step of the checkpoint.

    Raises:
        CheckpointError: There is no checkpoint or no row, or a file cannot be read.
    """
    files = newest_files(folder)
    rows = rows_for_rank(files, rank, size)
    if rows is None:
        raise CheckpointError(f"{folder} holds no rows yet, so there is nothing to find")
    job = read_header(*files[0]).get("job")
    key = job.get("partition_by") if isinstance(job, dict) else None
    names = {field.name for field in rows.layout.fields}
    config = BufferConfig(capacity=max(1, len(rows.rows)), partition_by=key if key in names else None)
    buffer = RehearsalBuffer(config, rows.layout, rank=rank)
    buffer.adopt(rows.rows.read_parts(), rows.written, rows.origin, rows.offered)
    return buffer, files[0][1].step
