"""Ranks that see the same samples: one of each data-parallel group, as under tensor, sequence or pipeline parallelism.

Everything in the package follows from the seed, the rank in the data-parallel group, the step and the rows offered.
So peers keep the same rows, each in the buffer of its own data-parallel group, and inject the same ones without a
message between them. They talk only when the first rows are there, and around checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rehearsal_plugin.checkpoint import Fingerprint
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import BatchError, CheckpointError, ConfigError
from rehearsal_plugin.rehearsal import Rehearsal

__all__ = ["Peers", "check_sequence_parallelism", "data_parallel_ranks", "peers_of"]


@dataclass(frozen=True)
class Report:
    """What a rank tells all others.

    Attributes:
        rank: Of the job.
        place: Its rank in its data-parallel group, the same for all peers; None where it rehearses nothing, as a stage
            in the middle of a pipeline.
        held: What it holds, where that matters.
        found: Whether there was a checkpoint.
        failure: The error that it is about to raise; empty for none.
    """

    rank: int
    place: int | None
    held: Fingerprint | None = None
    found: bool = False
    failure: str = ""


class Peers:
    """This rank among its peers. All ranks of the job make the same calls, in the same order.

    Args:
        rehearsal: That of this rank; None where it pulls no batches.
        ranks: Those of this rank's data-parallel group.
        sharded: Whether peers may see different parts of the same samples, as under sequence parallelism.
    """

    def __init__(self, rehearsal: Rehearsal | None, ranks: Sequence[int], *, sharded: bool) -> None:
        self._rehearsal, self._ranks, self._sharded = rehearsal, ranks, sharded
        self._checked = False

    def check_once(self) -> None:
        """Compare what peers hold; nothing from the second call on.

        Raises:
            BatchError: They hold different rows.
        """
        if not self._checked:
            self._checked = True
            self._compare(self._together(_held))

    def save(self, folder: Path) -> None:
        """Save what this rank holds, unless a peer saves the same.

        Args:
            folder: Where; peers with different parts of the samples save into folders of their own in it.

        Raises:
            BatchError: Peers hold different rows.
            CheckpointError: As for `Rehearsal.save`, or another rank failed.
        """
        reports = self._together(_held)
        self._compare(reports)
        if self._rehearsal is not None and reports[dist.get_rank()].place is not None:
            target = self._target(folder, reports)
            self._rehearsal.save(target or folder, write=target is not None)

    def load(self, folder: Path, step: int | None = None, *, missing_ok: bool = False) -> bool:
        """Load what this rank or a peer saved; see `Rehearsal.load`.

        Raises:
            BatchError: Peers hold different rows.
            CheckpointError: As for `Rehearsal.load`, or another rank failed, or only some found a checkpoint.
        """
        own = folder / self._name(self._together(_flushed))  # whatever a peer writes in the background is there now
        reports = self._together(lambda rehearsal: _loaded(rehearsal, folder, own, step, missing_ok=missing_ok))
        found = [report.found for report in reports if report.place is not None]
        if any(found) and not all(found):
            raise CheckpointError(
                f"only the ranks {[report.rank for report in reports if report.found]} found a rehearsal checkpoint in "
                f"{folder}; use a folder that all ranks share"
            )
        self._compare(reports)
        return any(found)

    def _together(self, act: Callable[[Rehearsal], dict[str, Any]]) -> list[Report]:
        """Do something on every rank that rehearses, and tell all of them how it went.

        Raises:
            CheckpointError: Another rank failed.
        """
        rank = dist.get_rank()
        report = Report(rank, None)
        if self._rehearsal is not None and not self._rehearsal.closed:
            report = Report(rank, self._ranks.index(rank))
            try:
                report = replace(report, **act(self._rehearsal))
            except Exception as error:
                _gathered(replace(report, failure=f"{type(error).__name__}: {error}"))  # nobody waits for this rank
                raise
        reports = _gathered(report)
        for failed in reports:
            if failed.failure:
                raise CheckpointError(f"rank {failed.rank} failed with {failed.failure}")
        return reports

    def _compare(self, reports: Sequence[Report]) -> None:
        """Refuse to go on with peers that hold different rows, on all ranks alike."""
        first: dict[int | None, Report] = {}
        for report in reports:
            mate = first.setdefault(report.place, report)
            if report.held is None or mate.held is None:
                continue
            if report.held.index != mate.held.index or not (self._sharded or report.held.fields == mate.held.fields):
                raise BatchError(
                    f"the ranks {mate.rank} and {report.rank} hold different rows, and both have rank {report.place} "
                    "in their data-parallel groups (they are tensor-, sequence- or pipeline-parallel); give them the "
                    "same batches, as a sampler does that goes by the rank in the data-parallel group"
                )

    def _target(self, folder: Path, reports: Sequence[Report]) -> Path | None:
        """Where this rank saves; None where a peer does it."""
        own = reports[dist.get_rank()]
        places = {report.place for report in reports}
        kinds = {(report.place, report.held) for report in reports}
        if len(kinds) > len(places):
            return folder / self._name(reports)
        first = next(report for report in reports if report.place == own.place)
        return folder if first is own else None

    def _name(self, reports: Sequence[Report]) -> str:
        """The folder of this rank where peers hold different parts of the samples."""
        rank = dist.get_rank()
        peers = [report.rank for report in reports if report.place == reports[rank].place]
        return f"rehearsal-peer{peers.index(rank)}-of-{len(peers)}"


def check_sequence_parallelism(engine: Any, config: RehearsalConfig) -> None:
    """Refuse what goes by the content of rows, where ranks may have different parts of them.

    Args:
        engine: A DeepSpeed engine.
        config: The `rehearsal` section.

    Raises:
        ConfigError: Peers would keep different rows, or see a different number of them.
    """
    by_content = {
        "rehearsal.padding": config.padding is not None,
        "rehearsal.non_finite 'skip'": config.non_finite == "skip",
        "rehearsal.buffer.preload": config.buffer.preload is not None,
        "rehearsal.buffer.deduplicate": config.buffer.deduplicate,
        "rehearsal.buffer.score_by 'loss'": config.buffer.by_loss,
        "rehearsal.guard.action 'raise_ratio'": config.guard is not None and config.guard.action == "raise_ratio",
    }
    given = [key for key, used in by_content.items() if used]
    if given and engine.sequence_parallel_size > 1:
        raise ConfigError(
            f"{' and '.join(given)} goes by the content of rows, of which sequence-parallel ranks may have different "
            "parts, so that they would not keep and replay the same ones; leave it out"
        )


def peers_of(engine: Any, rehearsal: Rehearsal | None, ranks: Sequence[int]) -> Peers | None:
    """The peers of this rank; None where every rank of the job sees samples of its own.

    Args:
        engine: A DeepSpeed engine.
        rehearsal: As for `Peers`.
        ranks: What `data_parallel_ranks` gave.
    """
    if len(ranks) == dist.get_world_size():
        return None
    return Peers(rehearsal, ranks, sharded=engine.sequence_parallel_size > 1)


def data_parallel_ranks(engine: Any) -> list[int]:
    """The ranks of the job that see other samples than this one, and this one, in the order of the samples.

    Args:
        engine: A DeepSpeed engine.

    Raises:
        ConfigError: They cannot be told.
    """
    if engine.data_parallel_group is not None:
        return dist.get_process_group_ranks(engine.data_parallel_group)
    # DeepSpeed's `parallel_state_sp` has no such group: its sequence-parallel groups are runs of ranks.
    everyone = dist.get_process_group_ranks(engine.seq_data_parallel_group)
    sequence = dist.get_process_group_ranks(engine.seq_parallel_group)
    start, size = everyone.index(sequence[0]), len(sequence)
    if start % size or everyone[start : start + size] != sequence:
        raise ConfigError(
            f"rank {dist.get_rank()} is in the sequence-parallel group {sequence} of {everyone}, and the engine has no "
            "data-parallel group; give deepspeed.initialize an mpu with get_data_parallel_group()"
        )
    return everyone[sequence.index(dist.get_rank()) :: size]


def _held(rehearsal: Rehearsal) -> dict[str, Any]:
    return {"held": rehearsal.fingerprint()}


def _flushed(rehearsal: Rehearsal) -> dict[str, Any]:
    rehearsal.flush()
    return {}


def _loaded(rehearsal: Rehearsal, folder: Path, own: Path, step: int | None, *, missing_ok: bool) -> dict[str, Any]:
    others = sorted(path.name for path in folder.glob("rehearsal-peer*-of-*"))
    if others and not own.is_dir():
        raise CheckpointError(
            f"{folder} has parts of samples, in {others}, and none for this job ({own.name}); load it with as many "
            "sequence-parallel ranks as when it was saved"
        )
    found = rehearsal.load(own if others else folder, step, missing_ok=missing_ok)
    return {"held": rehearsal.fingerprint(), "found": found}


def _gathered(report: Report) -> list[Report]:
    """The reports of all ranks, by rank."""
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports
