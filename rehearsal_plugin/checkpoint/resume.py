"""From a running job to a record, and from checkpoint files back to a job.

All ranks load in the same way. Each looks at one file of the newest complete checkpoint, and they take the highest
number among their answers:

| way | when | the job then has |
|---|---|---|
| `EXACT` | as many ranks, equal `job_settings`, state of a job in the files | all state: it goes on bit for bit |
| `RESHARD` | other ranks or settings, files of rows alone, or a preload | rows, shared out between its ranks |
| `MISSING` | no checkpoint in the folder | an empty buffer, or an error |
| `FAILED` | a rank met an error | an error on every rank |

After `RESHARD` the first draw comes as late as in a new job, and the state of the strategy is loaded if it is of that
name. Rows with recorded state need the strategy that recorded it, in both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.checkpoint.format import Content, RankFile, read_header, read_stamp
from rehearsal_plugin.checkpoint.job_settings import check_padding, check_strategy, goes_on, job_settings
from rehearsal_plugin.checkpoint.record import (
    Record,
    RowSet,
    SavedFile,
    pack_record,
    report_contradictions,
    rows_for_rank,
    unpack_record,
)
from rehearsal_plugin.checkpoint.timeline import find_newest
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.strategies import Strategy

__all__ = ["content_of", "preload", "resume"]

EXACT, RESHARD, MISSING, FAILED = range(4)
"""Ways of a load; see the table above."""

NO_ANSWER = (MISSING, 0, 0, 0, 0)
"""Of a rank that sees no checkpoint; see `_inspect_checkpoint`."""


def content_of(config: RehearsalConfig, coordinator: ReplayCoordinator, strategy: Strategy) -> tuple[RankFile, Content]:
    """The content of this rank's checkpoint, and its file; waits for the exchange in flight.

    Raises:
        ExchangeError: The exchange failed.
    """
    state, prefetcher = coordinator.state_dict(), coordinator.prefetcher
    progress = {"supply": state, "strategy": strategy.state_dict()}
    record = Record(
        job=job_settings(config, strategy),
        layout=None if prefetcher is None else prefetcher.buffer.layout,
        device="cpu" if prefetcher is None else prefetcher.device.type,
        buffer=None if prefetcher is None else prefetcher.buffer.state_dict(),
        progress=None if coordinator.lifecycle.alone else progress,
        digest=coordinator.digest,
        run=coordinator.lifecycle.run,
    )
    return RankFile(coordinator.step, coordinator.lifecycle.size, coordinator.lifecycle.rank), pack_record(record)


def resume(
    folder: Path,
    config: RehearsalConfig,
    coordinator: ReplayCoordinator,
    strategy: Strategy,
    *,
    step: int | None,
    run: str | None,
    missing_ok: bool,
) -> bool:
    """Load a checkpoint from a folder: all ranks the same one in the same way, or none.

    Args:
        folder: Folder of checkpoints that all ranks can see.
        config: The `rehearsal` section.
        coordinator: Coordinator of this job, whose state is replaced.
        strategy: Strategy of this job, whose state is replaced.
        step: Step of the checkpoint; None for the newest complete one.
        run: Run that saved it; None for any.
        missing_ok: Whether a missing checkpoint is no error.

    Returns:
        Whether a checkpoint was loaded.

    Raises:
        CheckpointError: There is none, a rank cannot load it, ranks see different ones, or its rows have other state.
        ExchangeError: A rank does not answer.
    """
    files, way = _find_checkpoint(folder, step, run, coordinator, job_settings(config, strategy), rows_only=False)
    if way == MISSING and not missing_ok:
        raise CheckpointError(f"{folder} has no rehearsal checkpoint; start without loading one, or name its folder")
    if way == MISSING:
        return False
    _load_on_all_ranks(lambda: _load_rank(files, way, config, coordinator, strategy), folder, coordinator)
    return True


def preload(
    folder: Path, config: RehearsalConfig, coordinator: ReplayCoordinator, strategy: Strategy, device: torch.device
) -> None:
    """Start a new job with the rows of a checkpoint, shared out between its ranks; all ranks must call it.

    Args:
        folder: Folder of a checkpoint of any job, or of `rehearsal seed`.
        config: The `rehearsal` section.
        coordinator: Coordinator of the new job, which starts at step 0.
        strategy: Strategy of the new job; its state is loaded if that job used the same one.
        device: Device of the batches.

    Raises:
        CheckpointError: There are no rows, a rank cannot load them, ranks see different ones, or they have other state.
        ExchangeError: A rank does not answer.
    """
    files, way = _find_checkpoint(folder, None, None, coordinator, job_settings(config, strategy), rows_only=True)
    if way == MISSING:
        raise CheckpointError(f"{folder} has no rehearsal checkpoint; name the folder of one, or of a seed")
    _load_on_all_ranks(
        lambda: _load_rank(files, way, config, coordinator, strategy, new_on=device), folder, coordinator
    )
    if coordinator.prefetcher is None:
        raise CheckpointError(f"{folder} holds no rows yet; name the folder of a checkpoint with rows, or of a seed")


def _find_checkpoint(
    folder: Path,
    step: int | None,
    run: str | None,
    coordinator: ReplayCoordinator,
    job: Mapping[str, Any],
    *,
    rows_only: bool,
) -> tuple[list[SavedFile], int]:
    """The files of the newest checkpoint, and the way to load it that all ranks agree on."""
    try:
        files = [(folder, rank_file) for rank_file in find_newest(folder, step, run) or []]
        answer = _inspect_checkpoint(files, coordinator, job, rows_only=rows_only) if files else NO_ANSWER
    except Exception:
        coordinator.agree(FAILED, *NO_ANSWER[1:])  # so that no rank waits for this one
        raise
    return files, _common_way(coordinator.agree(*answer), folder)


def _load_on_all_ranks(load: Callable[[], None], folder: Path, coordinator: ReplayCoordinator) -> None:
    """Load on every rank, or fail on every rank."""
    try:
        load()
    except Exception:
        coordinator.agree(FAILED, *NO_ANSWER[1:])
        raise
    _common_way(coordinator.agree(RESHARD, *NO_ANSWER[1:]), folder)


def _inspect_checkpoint(
    files: Sequence[SavedFile], coordinator: ReplayCoordinator, job: Mapping[str, Any], *, rows_only: bool
) -> tuple[int, int, int, int, int]:
    """This rank's answer: the way it can load, and step, number of ranks, digest and run of the checkpoint."""
    file = files[coordinator.lifecycle.rank % len(files)]
    with report_contradictions(file[0] / file[1].name):
        meta = read_header(*file)
        check_strategy(meta["job"], job, rows=meta["layout"] is not None, path=file[0] / file[1].name)
        if meta["layout"] is not None:
            check_padding(meta["job"], job, file[0] / file[1].name)
        as_many = len(files) == coordinator.lifecycle.size
        same_job = as_many and meta["state"]["progress"] is not None and goes_on(meta["job"], job)
        exact = same_job and not rows_only
        digest = int(meta["digest"])
        if digest.bit_length() > 63:
            raise ValueError("a digest of more than 64 bits")
        # Of as many ranks each looks at one file, and the answers are compared.
        run = 0 if rows_only else _common_run([file] if len(files) == coordinator.lifecycle.size else files)
        # Rows that are shared out need not have been saved together, but by one run.
        return EXACT if exact else RESHARD, file[1].step, len(files), digest if exact else 0, run


def _common_way(answers: list[list[int]], folder: Path) -> int:
    """The way that is open to all ranks, out of the answers of `_inspect_checkpoint` by rank.

    Raises:
        CheckpointError: A rank failed, ranks see different checkpoints, or files of different saves are mixed.
    """
    ways = [answer[0] for answer in answers]
    if FAILED in ways:
        raise CheckpointError(f"rank {ways.index(FAILED)} cannot load the checkpoint in {folder}; see its log")
    if len({(answer[0] == MISSING, *answer[1:3]) for answer in answers}) > 1:
        by_rank = ", ".join(f"rank {rank}: step {answer[1]} of {answer[2]}" for rank, answer in enumerate(answers))
        raise CheckpointError(
            f"the ranks see different checkpoints in {folder} ({by_rank}); use a folder that all ranks share, wait "
            "until all have saved, or name the step"
        )
    if (RESHARD not in ways and len({answer[3] for answer in answers}) > 1) or len({run[4] for run in answers}) > 1:
        raise CheckpointError(_saved_apart(folder))
    return max(ways)


def _common_run(files: Sequence[SavedFile]) -> int:
    """The run that wrote all files of a checkpoint as a number; 0 where they name none, or each rank was one by itself.

    Raises:
        CheckpointError: They are of different runs.
    """
    if read_header(*files[0])["job"].get("scope") == "local":
        return 0
    runs = {read_stamp(*file).run for file in files}
    if len(runs) > 1:
        raise CheckpointError(_saved_apart(files[0][0]))
    return int(runs.pop() or "0", 16) >> 1


def _saved_apart(folder: Path) -> str:
    return (
        f"the files of the checkpoint in {folder} were not saved together, but by different runs; remove those of "
        "one, or give an earlier step"
    )


def _load_rank(
    files: Sequence[SavedFile],
    way: int,
    config: RehearsalConfig,
    coordinator: ReplayCoordinator,
    strategy: Strategy,
    new_on: torch.device | None = None,
) -> None:
    """Load this rank; `new_on` is the device of a new job's batches, None where the job of the files goes on."""
    file = files[coordinator.lifecycle.rank % len(files)]
    with report_contradictions(file[0] / file[1].name):
        meta = read_header(*file)
        device = _choose_device(str(meta["device"])) if new_on is None else new_on
        run = read_stamp(*file).run if new_on is None else None
        strategy_state = (meta["state"]["progress"] or {}).get("strategy")
        if way == EXACT or (strategy_state and meta["job"].get("strategy") == config.strategy.name):
            record = unpack_record(*file)
            assert record.progress is not None  # the header says so, and is part of the checksum
            strategy.load_state_dict(record.progress["strategy"])
            if way == EXACT:
                coordinator.lifecycle.go_on_as(run)
                coordinator.load_state_dict(record.progress["supply"], record.layout, device, record.buffer)
    if way == RESHARD:
        _load_share(files, config, coordinator, device, run, new=new_on is not None)


def _load_share(
    files: Sequence[SavedFile],
    config: RehearsalConfig,
    coordinator: ReplayCoordinator,
    device: torch.device,
    run: str | None,
    *,
    new: bool,
) -> None:
    """Fill an empty buffer with this rank's share of the rows."""
    rows, policy = rows_for_rank(files, coordinator.lifecycle.rank, coordinator.lifecycle.size), config.buffer.policy
    step = 0 if new else files[0][1].step
    coordinator.lifecycle.go_on_as(run)
    if rows is None:
        coordinator.reset(step)
        return
    buffer = coordinator.adopt(step, rows.layout, device)
    rng = generator(config.seed, Purpose.RESHARD, step, coordinator.lifecycle.rank)
    if config.buffer.deduplicate:
        rows = rows.without_duplicates()
    fitting = buffer.capacity if buffer.budget is None else buffer.budget.rows_that_fit(rows.rows.read_parts())
    capacity = min(buffer.capacity, fitting)
    if policy == "fifo":  # rows are in the order of their age
        rows = rows.select(np.arange(max(0, len(rows.rows) - capacity), len(rows.rows)))
    equal = policy == "balanced" or config.buffer.by_features
    rows = rows.with_keys(_partition_keys(buffer, rows)).cut_to(capacity, equal=equal, rng=rng)
    # Under fifo the number of offered rows gives the next slot, so it has to be that of the rows.
    offered: Mapping[int, int] = {} if policy == "fifo" else rows.offered
    written = np.zeros_like(rows.written) if new else rows.written
    with report_contradictions(files[0][0]):
        buffer.adopt(rows.rows.read_parts(), written, rows.origin, offered)


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
