"""From the files of a checkpoint to the state of a job; `agreement` says which files, and which way."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.checkpoint.format import read_header, read_stamp
from rehearsal_plugin.checkpoint.job_settings import check_padding, check_partition, check_strategy, job_settings
from rehearsal_plugin.checkpoint.record import RowSet, rows_for_rank, unpack_record
from rehearsal_plugin.checkpoint.reshard import FileRows
from rehearsal_plugin.checkpoint.saved_file import SavedFile, report_contradictions
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.strategies import Strategy

LOG = logging.getLogger(__name__)

__all__ = ["JobParts", "check_file", "load_rank"]


@dataclass(frozen=True)
class JobParts:
    """The parts of a job that a checkpoint is loaded into.

    Attributes:
        config: The `rehearsal` section.
        coordinator: Its state is replaced.
        strategy: Its state is replaced.
        new_on: Device of the batches where a new job begins with the rows; None where the job of the files goes on.
    """

    config: RehearsalConfig
    coordinator: ReplayCoordinator
    strategy: Strategy
    new_on: torch.device | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """See `job_settings`."""
        return job_settings(self.config, self.strategy)


def check_file(meta: Mapping[str, Any], job: Mapping[str, Any], file: SavedFile) -> None:
    """Refuse rows that a job with the settings `job` cannot use; see `job_settings`.

    Raises:
        CheckpointError: They were recorded by another strategy, padded otherwise, or lack a partition.
    """
    path = file[0] / file[1].name
    check_strategy(meta["job"], job, rows=meta["layout"] is not None, path=path)
    if meta["layout"] is not None:
        check_padding(meta["job"], job, path)
        check_partition([name for name, *_ in meta["layout"]["fields"]], job, path)


def load_rank(
    files: Sequence[SavedFile], parts: JobParts, *, exact: bool, listed: Sequence[FileRows] | None = None
) -> None:
    """Load this rank's state, or its share of the rows.

    Args:
        files: The files of a checkpoint by rank.
        parts: What is loaded into.
        exact: Whether the job goes on bit for bit; else its ranks share out the rows.
        listed: The rows in each file; None reads all headers, see `rows_for_rank`.

    Raises:
        CheckpointError: A file cannot be read, or suits another job.
    """
    coordinator, strategy, new_on = parts.coordinator, parts.strategy, parts.new_on
    file = files[coordinator.lifecycle.rank % len(files)]
    with report_contradictions(file[0] / file[1].name):
        meta = read_header(*file)
        check_file(meta, parts.settings, file)
        device = _choose_device(str(meta["device"])) if new_on is None else new_on
        run = read_stamp(*file).run if new_on is None else None
        strategy_state = (meta["state"]["progress"] or {}).get("strategy")
        if exact or (strategy_state and meta["job"].get("strategy") == parts.config.strategy.name):
            record = unpack_record(*file)
            assert record.progress is not None  # the header says so, and is part of the checksum
            strategy.load_state_dict(record.progress["strategy"])
            if exact:
                coordinator.lifecycle.go_on_as(run)
                coordinator.load_state_dict(record.progress["supply"], record.layout, device, record.buffer)
    if not exact:
        coordinator.lifecycle.go_on_as(run)
        _load_share(files, listed, parts, device)
    if new_on is None and parts.config.follows_losses:
        _load_forgetting(meta, file, parts, exact=exact)


def _load_forgetting(meta: Mapping[str, Any], file: SavedFile, parts: JobParts, *, exact: bool) -> None:
    """Go on from the levels that the ranks of the checkpoint knew, all the same ones, where partitions are the same."""
    supply = (meta["state"]["progress"] or {}).get("supply") or {}
    same_partitions = meta["job"].get("partition_by") == parts.config.buffer.partition_by
    if "forgetting" in supply and same_partitions:
        if not exact:  # else it is loaded with all the rest
            record = unpack_record(*file)
            assert record.progress is not None  # as above
            known, coordinator = record.progress["supply"]["forgetting"], parts.coordinator
            coordinator.losses.go_on_from([known], coordinator.queue.ratio)
    elif not parts.coordinator.lifecycle.rank:
        LOG.warning(
            "%s knows of no loss to compare with, so the forgetting budget and the mixture begin anew with this load",
            file[0],
        )


def _load_share(
    files: Sequence[SavedFile], listed: Sequence[FileRows] | None, parts: JobParts, device: torch.device
) -> None:
    """Fill an empty buffer with this rank's share of the rows."""
    config, coordinator, new = parts.config, parts.coordinator, parts.new_on is not None
    rows = rows_for_rank(files, coordinator.lifecycle.rank, coordinator.lifecycle.size, listed)
    policy, step = config.buffer.policy, 0 if new else files[0][1].step
    if rows is None:
        coordinator.reset(step)
        return
    buffer = coordinator.adopt(step, rows.layout, device)
    rng = generator(config.seed, Purpose.RESHARD, step, coordinator.lifecycle.rank)
    if config.buffer.deduplicate:
        rows = rows.without_duplicates()
    fitting = buffer.capacity if buffer.budget is None else buffer.budget.rows_that_fit(rows.rows.read_parts())
    capacity, dealt = min(buffer.capacity, fitting), len(rows.rows)
    if policy == "fifo":  # rows are in the order of their age
        rows = rows.select(np.arange(max(0, len(rows.rows) - capacity), len(rows.rows)))
    equal = policy == "balanced" or config.buffer.by_features
    rows = rows.with_keys(_partition_keys(buffer, rows)).cut_to(capacity, equal=equal, rng=rng)
    # Under fifo the number of offered rows gives the next slot, so it has to be that of the rows.
    offered: Mapping[int, int] = {} if policy == "fifo" else rows.offered
    written = np.zeros_like(rows.written) if new else rows.written
    with report_contradictions(files[0][0]):
        buffer.adopt(rows.rows.read_parts(), written, rows.origin, offered)
    if not coordinator.lifecycle.rank and len(buffer) < dealt:
        LOG.info(
            "rehearsal: rank 0 keeps %d of its share of %d rows, as its buffer has no room for more", len(buffer), dealt
        )


def _partition_keys(buffer: RehearsalBuffer, rows: RowSet) -> IntArray:
    """The keys `[n]` int64 of the rows under the partitions of a buffer."""
    if buffer.slot_index.partitions is None:
        return np.zeros(len(rows.rows), dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype=np.int64), *map(buffer.keys, rows.rows.read_parts())])


def _choose_device(kind: str) -> torch.device:
    """The device of the batches: of the kind in the checkpoint, or else the CPU."""
    if kind == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
