"""From a running job to files, and from files to a job that goes on.

A job of as many ranks with the same settings goes on bit for bit. Any other takes the rows over: they are shared out
between its ranks, and its first draw comes as late as in a new job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rehearsal_plugin.checkpoint.content import Record, Saved, consistent, dealt, pack, unpack
from rehearsal_plugin.checkpoint.files import Content, Place, find_set
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.rng import Purpose, generator
from rehearsal_plugin.strategies import Strategy
from rehearsal_plugin.supply import Supply

__all__ = ["content_of", "resume"]

GO_ON, TAKE_OVER, FAILED = range(3)


def content_of(config: RehearsalConfig, supply: Supply, strategy: Strategy) -> tuple[Place, Content]:
    """What is to be saved, and under which name; waits for the exchange in flight.

    Raises:
        ExchangeError: That failed.
    """
    supplied, pipeline = supply.state_dict(), supply.pipeline
    progress = {"supply": supplied, "strategy": strategy.state_dict()}
    record = Record(
        job=_job(config, strategy),
        layout=None if pipeline is None else pipeline.buffer.layout,
        device="cpu" if pipeline is None else pipeline.device.type,
        buffer=None if pipeline is None else pipeline.buffer.state_dict(),
        progress=None if supply.alone else progress,
    )
    return Place(supply.step, supply.size, supply.rank), pack(record)


def resume(folder: Path, config: RehearsalConfig, supply: Supply, strategy: Strategy) -> None:
    """Go on from the newest checkpoint in a folder; the ranks agree on how.

    Raises:
        CheckpointError: There is none, a rank cannot read it, or its rows are not those of this job's strategy.
        ExchangeError: A rank does not answer.
    """
    job = _job(config, strategy)
    try:
        files = _found(folder)
        own = files[supply.rank % len(files)]
        record = unpack(*own)
        _check_strategy(record, job, folder)
    except CheckpointError:
        supply.agree(FAILED)  # nobody waits for this rank
        raise
    whole = len(files) == supply.size and record.progress is not None and record.job == job
    verdicts = supply.agree(GO_ON if whole else TAKE_OVER)
    if FAILED in verdicts:
        raise CheckpointError(f"rank {verdicts.index(FAILED)} cannot load the checkpoint in {folder}; see its log")
    with consistent(folder / own[1].name):
        if record.progress is not None:
            strategy.load_state_dict(record.progress["strategy"])
        if record.progress is not None and TAKE_OVER not in verdicts:
            supply.load_state_dict(record.progress["supply"], record.layout, _device(record), record.buffer)
            return
    _take_over(files, config, supply, _device(record))


def _found(folder: Path) -> list[Saved]:
    files = find_set(folder)
    if files is None:
        raise CheckpointError(f"{folder} has no rehearsal checkpoint; start without loading one, or name its folder")
    return [(folder, place) for place in files]


def _take_over(files: Sequence[Saved], config: RehearsalConfig, supply: Supply, device: torch.device) -> None:
    """Fill an empty buffer with this rank's share of the rows."""
    rows = dealt(files, supply.rank, supply.size)
    if rows is None:
        supply.restart(files[0][1].step)
        return
    buffer = supply.adopt(files[0][1].step, rows.layout, device)
    rng = generator(config.seed, Purpose.RESHARD, supply.step, supply.rank)
    rows = rows.keyed(buffer.keys(rows.rows)).within(buffer.capacity, equal=config.buffer.policy == "balanced", rng=rng)
    # Under fifo the next slot is a number of rows offered, and rows are in the order of their age here.
    seen: Mapping[int, int] = {} if config.buffer.policy == "fifo" else rows.seen
    with consistent(files[0][0]):
        buffer.adopt(rows.rows, rows.written, rows.origin, seen)


def _job(config: RehearsalConfig, strategy: Strategy) -> dict[str, Any]:
    """The settings that the state depends on."""
    buffer, sampling = config.buffer, config.sampling
    return {
        "capacity": buffer.capacity,
        "policy": buffer.policy,
        "partition_by": buffer.partition_by,
        "score_by": buffer.score_by,
        "weights": sampling.weights,
        "scope": sampling.scope,
        "strategy": config.strategy.name,
        "outputs": config.strategy.outputs,
        "k": config.strategy.k,
        "draws": strategy.draws,
        "records": strategy.records,
    }


def _check_strategy(record: Record, job: Mapping[str, Any], path: Path) -> None:
    """Rows carry what their strategy recorded; another one could not read it, or would miss it."""
    asked = [name for name in ("strategy", "outputs", "k") if record.job.get(name) != job[name]]
    by_loss = (record.job.get("score_by") == "loss") != (job["score_by"] == "loss")
    if record.layout is None or not (asked or by_loss) or not (record.job.get("records") or job["records"]):
        return
    then, now = (
        ", ".join(f"{name} {one.get(name)!r}" for name in ("strategy", "outputs", "k", "score_by"))
        for one in (record.job, job)
    )
    raise CheckpointError(
        f"{path} holds rows with what was recorded under {then}, and this job has {now}; keep rehearsal.strategy and "
        "buffer.score_by, or start with an empty buffer"
    )


def _device(record: Record) -> torch.device:
    """Where batches will live: where they lived, if there is such a device."""
    if record.device == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
