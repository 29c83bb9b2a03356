"""From a running job to a record, and from checkpoint files back to a job; `agreement` has the ways of a load.

After `RESHARD` the first draw comes as late as in a new job, and the state of the strategy is loaded if it is of that
name. Rows with recorded state need the strategy that recorded it, in both ways.
"""

from __future__ import annotations

import logging
from pathlib import Path

from rehearsal_plugin.checkpoint.agreement import MISSING, Agreement, find_checkpoint, on_all_ranks
from rehearsal_plugin.checkpoint.fetch import fetched_files
from rehearsal_plugin.checkpoint.format import Content, RankFile
from rehearsal_plugin.checkpoint.job_settings import job_settings
from rehearsal_plugin.checkpoint.loading import JobParts, load_rank
from rehearsal_plugin.checkpoint.record import Record, pack_record
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.slow_work import telling_when_slow
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.strategies import Strategy

__all__ = ["content_of", "preload", "resume"]

LOG = logging.getLogger(__name__)


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


def resume(folder: Path, parts: JobParts, *, step: int | None, run: str | None, missing_ok: bool) -> int | None:
    """Load a checkpoint from a folder: all ranks the same one in the same way, or none.

    Args:
        folder: Folder of checkpoints: one for all ranks, or one on each host.
        parts: The job, whose state is replaced.
        step: Step of the checkpoint; None for the newest complete one.
        run: Run that saved it; None for any.
        missing_ok: Whether a missing checkpoint is no error.

    Returns:
        The highest number of a save on the disks of others, which later saves have to exceed, see `timeline`; None
        without a checkpoint.

    Raises:
        CheckpointError: There is none, a rank cannot load it, files are missing, or its rows have other state.
        ExchangeError: A rank does not answer.
    """
    agreement = find_checkpoint(folder, step, run, parts)
    if agreement.way == MISSING and not missing_ok:
        raise CheckpointError(f"{folder} has no rehearsal checkpoint; start without loading one, or name its folder")
    return None if agreement.way == MISSING else _load(folder, agreement, parts)


def preload(folder: Path, parts: JobParts) -> None:
    """Start a new job with the rows of a checkpoint, shared out between its ranks; all ranks must call it.

    Args:
        folder: Folder of a checkpoint of any job, or of `rehearsal seed`.
        parts: The new job, which starts at step 0; the state of its strategy is loaded if that job used the same one.

    Raises:
        CheckpointError: There are no rows, a rank cannot load them, files are missing, or they have other state.
        ExchangeError: A rank does not answer.
    """
    agreement = find_checkpoint(folder, None, None, parts)
    if agreement.way == MISSING:
        raise CheckpointError(f"{folder} has no rehearsal checkpoint; name the folder of one, or of a seed")
    _load(folder, agreement, parts)
    if parts.coordinator.prefetcher is None:
        raise CheckpointError(f"{folder} holds no rows yet; name the folder of a checkpoint with rows, or of a seed")


def _load(folder: Path, agreement: Agreement, parts: JobParts) -> int:
    """Load what the ranks have agreed on; returns as `resume` does."""

    def load() -> None:
        spread = agreement.spread
        if spread is None:
            load_rank(agreement.files, parts, exact=agreement.exact)
            return
        needed = [agreement.needed(rank) for rank in range(agreement.ranks)]
        with fetched_files(folder, spread, needed, parts.coordinator) as files:
            load_rank(files, parts, exact=agreement.exact, listed=[file.rows for file in spread.files])

    with telling_when_slow(f"loading {folder}"):
        on_all_ranks(load, folder, parts.coordinator)
    _log_loaded(folder, agreement, parts)
    return agreement.last_number


def _log_loaded(folder: Path, agreement: Agreement, parts: JobParts) -> None:
    """Count the rows that are stored now, and say on rank 0 how the job goes on."""
    coordinator = parts.coordinator
    stored = 0 if coordinator.prefetcher is None else len(coordinator.prefetcher.buffer)
    coordinator.metrics.rows_stored = stored
    if not coordinator.lifecycle.rank:
        how = "replay goes on bit for bit" if agreement.exact else "rows were shared out anew, and totals begin at 0"
        LOG.info("rehearsal: loaded %s at step %d, with %d rows on rank 0; %s", folder, coordinator.step, stored, how)
