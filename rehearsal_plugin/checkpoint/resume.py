"""From a running job to files, and from files to a job that goes on.

A job of as many ranks with the same settings goes on bit for bit. Any other takes the rows over: they are shared out
between its ranks, and its first draw comes as late as in a new job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.checkpoint.format import Content, Place, find_set, peek
from rehearsal_plugin.checkpoint.record import Record, Rows, Saved, consistent, dealt, pack, unpack
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.strategies import Strategy

__all__ = ["content_of", "preload", "resume"]

GO_ON, TAKE_OVER, MISSING, FAILED = range(4)
"""What a rank can do with what it finds."""


def content_of(config: RehearsalConfig, coordinator: ReplayCoordinator, strategy: Strategy) -> tuple[Place, Content]:
    """What is to be saved, and under which name; waits for the exchange in flight.

    Raises:
        ExchangeError: That failed.
    """
    supplied, prefetcher = coordinator.state_dict(), coordinator.prefetcher
    progress = {"supply": supplied, "strategy": strategy.state_dict()}
    record = Record(
        job=_job(config, strategy),
        layout=None if prefetcher is None else prefetcher.buffer.layout,
        device="cpu" if prefetcher is None else prefetcher.device.type,
        buffer=None if prefetcher is None else prefetcher.buffer.state_dict(),
        progress=None if coordinator.lifecycle.alone else progress,
        digest=coordinator.digest,
    )
    return Place(coordinator.step, coordinator.lifecycle.size, coordinator.lifecycle.rank), pack(record)


def resume(
    folder: Path,
    config: RehearsalConfig,
    coordinator: ReplayCoordinator,
    strategy: Strategy,
    *,
    step: int | None,
    missing_ok: bool,
) -> bool:
    """Go on from a checkpoint in a folder: all ranks from the same one, in the same way, or none.

    Args:
        folder: Where.
        config: The `rehearsal` section.
        coordinator: Is filled.
        strategy: Is told what it remembered.
        step: Of the checkpoint; None for the newest complete one.
        missing_ok: Whether there may be none.

    Returns:
        Whether there was one.

    Raises:
        CheckpointError: There is none, a rank cannot load it, ranks see different ones, or its rows are not those of
            this job's strategy.
        ExchangeError: A rank does not answer.
    """
    files, way = _found(folder, step, coordinator, _job(config, strategy), rows_only=False)
    if way == MISSING and not missing_ok:
        raise CheckpointError(f"{folder} has no rehearsal checkpoint; start without loading one, or name its folder")
    if way == MISSING:
        return False
    _together(lambda: _load(files, way, config, coordinator, strategy), folder, coordinator)
    return True


def preload(
    folder: Path, config: RehearsalConfig, coordinator: ReplayCoordinator, strategy: Strategy, device: torch.device
) -> None:
    """Begin a new job with the rows of a folder, shared out between its ranks; all ranks must call it.

    Args:
        folder: Of a checkpoint of any job, or what was seeded.
        config: The `rehearsal` section.
        coordinator: Is filled, and begins at step 0.
        strategy: Is told what it remembered, if it is the one of that job.
        device: Where batches live.

    Raises:
        CheckpointError: There are no rows, a rank cannot load them, ranks see different ones, or they are not those of
            this job's strategy.
        ExchangeError: A rank does not answer.
    """
    files, way = _found(folder, None, coordinator, _job(config, strategy), rows_only=True)
    if way == MISSING:
        raise CheckpointError(f"{folder} has no rehearsal checkpoint; name the folder of one, or of a seed")
    _together(lambda: _load(files, way, config, coordinator, strategy, new_on=device), folder, coordinator)
    if coordinator.prefetcher is None:
        raise CheckpointError(f"{folder} holds no rows yet; name the folder of a checkpoint with rows, or of a seed")


def _found(
    folder: Path, step: int | None, coordinator: ReplayCoordinator, job: Mapping[str, Any], *, rows_only: bool
) -> tuple[list[Saved], int]:
    """The files of the checkpoint that all ranks see, and the way that is open to all of them."""
    try:
        files = [(folder, place) for place in find_set(folder, step) or []]
        seen = _look(files, coordinator, job, rows_only=rows_only) if files else (MISSING, 0, 0, 0)
    except Exception:
        coordinator.agree(FAILED, 0, 0, 0)  # nobody waits for this rank
        raise
    return files, _agreed(coordinator.agree(*seen), folder)


def _together(load: Callable[[], None], folder: Path, coordinator: ReplayCoordinator) -> None:
    """Load on every rank, or fail on every rank."""
    try:
        load()
    except Exception:
        coordinator.agree(FAILED, 0, 0, 0)
        raise
    _agreed(coordinator.agree(TAKE_OVER, 0, 0, 0), folder)


def _look(
    files: Sequence[Saved], coordinator: ReplayCoordinator, job: Mapping[str, Any], *, rows_only: bool
) -> tuple[int, int, int, int]:
    """What this rank can do with a checkpoint, and which one it is: way, step, ranks, and digest of one save."""
    own = files[coordinator.lifecycle.rank % len(files)]
    with consistent(own[0] / own[1].name):
        meta = peek(*own)
        _check_strategy(meta["job"], job, rows=meta["layout"] is not None, path=own[0] / own[1].name)
        alike = (
            len(files) == coordinator.lifecycle.size and meta["state"]["progress"] is not None and meta["job"] == job
        )
        whole = alike and not rows_only
        digest = int(meta["digest"])
        if digest.bit_length() > 63:
            raise ValueError("a digest of more than 64 bits")
        # Rows that are shared out anew need not have been saved together.
        return GO_ON if whole else TAKE_OVER, own[1].step, len(files), digest if whole else 0


def _agreed(answers: list[list[int]], folder: Path) -> int:
    """The way that is open to all ranks.

    Raises:
        CheckpointError: There is none.
    """
    ways = [answer[0] for answer in answers]
    if FAILED in ways:
        raise CheckpointError(f"rank {ways.index(FAILED)} cannot load the checkpoint in {folder}; see its log")
    if len({(answer[0] == MISSING, *answer[1:3]) for answer in answers}) > 1:
        told = ", ".join(f"rank {rank}: step {answer[1]} of {answer[2]}" for rank, answer in enumerate(answers))
        raise CheckpointError(
            f"the ranks see different checkpoints in {folder} ({told}); use a folder that all ranks share, wait until "
            "all have saved, or name the step"
        )
    if TAKE_OVER not in ways and len({answer[3] for answer in answers}) > 1:
        raise CheckpointError(
            f"the files of the checkpoint in {folder} were not saved together, but by different runs; remove those of "
            "one, or give an earlier step"
        )
    return max(ways)


def _load(
    files: Sequence[Saved],
    way: int,
    config: RehearsalConfig,
    coordinator: ReplayCoordinator,
    strategy: Strategy,
    new_on: torch.device | None = None,
) -> None:
    """Fill this rank; `new_on` is where batches of a new job live, None where the job of the files goes on."""
    own = files[coordinator.lifecycle.rank % len(files)]
    with consistent(own[0] / own[1].name):
        meta = peek(*own)
        device = _device(str(meta["device"])) if new_on is None else new_on
        remembered = (meta["state"]["progress"] or {}).get("strategy")
        if way == GO_ON or (remembered and meta["job"].get("strategy") == config.strategy.name):
            record = unpack(*own)
            assert record.progress is not None  # the header says so, and is part of the checksum
            strategy.load_state_dict(record.progress["strategy"])
            if way == GO_ON:
                coordinator.load_state_dict(record.progress["supply"], record.layout, device, record.buffer)
    if way == TAKE_OVER:
        _take_over(files, config, coordinator, device, new=new_on is not None)


def _take_over(
    files: Sequence[Saved], config: RehearsalConfig, coordinator: ReplayCoordinator, device: torch.device, *, new: bool
) -> None:
    """Fill an empty buffer with this rank's share of the rows."""
    rows, policy = dealt(files, coordinator.lifecycle.rank, coordinator.lifecycle.size), config.buffer.policy
    step = 0 if new else files[0][1].step
    if rows is None:
        coordinator.reset(step)
        return
    buffer = coordinator.adopt(step, rows.layout, device)
    rng = generator(config.seed, Purpose.RESHARD, step, coordinator.lifecycle.rank)
    if config.buffer.deduplicate:
        rows = rows.distinct()
    if policy == "fifo":  # rows are in the order of their age
        rows = rows.select(np.arange(max(0, len(rows.rows) - buffer.capacity), len(rows.rows)))
    equal = policy == "balanced" or config.buffer.by_features
    rows = rows.keyed(_keys(buffer, rows)).within(buffer.capacity, equal=equal, rng=rng)
    # Under fifo the next slot is a number of rows offered.
    seen: Mapping[int, int] = {} if policy == "fifo" else rows.seen
    written = np.zeros_like(rows.written) if new else rows.written
    with consistent(files[0][0]):
        buffer.adopt(rows.rows.parts(), written, rows.origin, seen)


def _keys(buffer: RehearsalBuffer, rows: Rows) -> IntArray:
    """The partition keys `[n]` int64 that the rows have in a buffer."""
    if buffer.slot_index.partitions is None:
        return np.zeros(len(rows.rows), dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype=np.int64), *map(buffer.keys, rows.rows.parts())])


def _job(config: RehearsalConfig, strategy: Strategy) -> dict[str, Any]:
    """The settings that the state depends on."""
    buffer, sampling, found = config.buffer, config.sampling, config.retrieval
    embedded = {} if found is None or found.module is None else {"embedding": found.embedding}
    return {
        **embedded,
        "capacity": buffer.capacity,
        "policy": buffer.policy,
        "partition_by": buffer.partition_by,
        "score_by": buffer.score_by,
        "deduplicate": buffer.deduplicate,
        "weights": config.drawn_by,
        "scope": sampling.scope,
        "strategy": config.strategy.name,
        "outputs": config.strategy.outputs,
        "k": config.strategy.k,
        "draws": strategy.draws,
        "records": strategy.records,
    }


def _check_strategy(then: Mapping[str, Any], now: Mapping[str, Any], *, rows: bool, path: Path) -> None:
    """Rows carry what their strategy recorded; another one could not read it, or would miss it."""
    asked = any(then.get(name) != now[name] for name in ("strategy", "outputs", "k"))
    by_loss = (then.get("score_by") == "loss") != (now["score_by"] == "loss")
    embedded = then.get("embedding") != now.get("embedding")
    if not rows or not (asked or by_loss or embedded) or not (then.get("records") or now["records"]):
        return
    told = (
        ", ".join(f"{name} {job.get(name)!r}" for name in ("strategy", "outputs", "k", "score_by", "embedding"))
        for job in (then, now)
    )
    raise CheckpointError(
        f"{path} holds rows with what was recorded under {next(told)}, and this job has {next(told)}; keep "
        "rehearsal.strategy, buffer.score_by and retrieval, or start with an empty buffer"
    )


def _device(kind: str) -> torch.device:
    """Where batches will live: where they lived, if there is such a device."""
    if kind == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
