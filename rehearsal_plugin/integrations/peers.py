"""Peers: ranks that see the same samples, one of each data-parallel group.

Tensor, sequence and pipeline parallelism have peers. All choices follow from the seed, the rank in the data-parallel
group, the step and the offered rows. So peers keep the same rows, each in the buffer of its own data-parallel group,
and inject the same ones without a message between them. They communicate after the first step and around checkpoints.

    ranks 0 1   data-parallel group A      peers: 0 and 2 (place 0), 1 and 3 (place 1)
    ranks 2 3   data-parallel group B
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
    """Message of one rank to all ranks of the job.

    Attributes:
        rank: Rank in the job.
        place: Rank in its data-parallel group, the same for all peers; None for a rank without a rehearsal, such as a
            middle stage of a pipeline.
        fingerprint: Digests of its rows; None where they do not matter.
        run: Its run, see `Rehearsal.run`.
        loaded: Whether it loaded a checkpoint.
        subfolders: Subfolders of peers with different parts of the samples, where it loads from.
        failure: The error that it is about to raise; empty for none.
    """

    rank: int
    place: int | None
    fingerprint: Fingerprint | None = None
    run: str | None = None
    loaded: bool = False
    subfolders: tuple[str, ...] = ()
    failure: str = ""


class Peers:
    """Compares, saves and loads the rows of peers; all ranks of the job make the same calls in the same order.

    Args:
        rehearsal: The rehearsal of this rank; None where it pulls no batches.
        ranks: Ranks of its data-parallel group.
        sharded: Whether peers may see different parts of the same samples, as under sequence parallelism.
    """

    def __init__(self, rehearsal: Rehearsal | None, ranks: Sequence[int], *, sharded: bool) -> None:
        self._rehearsal, self._ranks, self._sharded = rehearsal, ranks, sharded
        self._checked = False

    def check_once(self) -> None:
        """Compare the rows of peers at the first call; later calls do nothing.

        Raises:
            BatchError: Peers hold different rows.
        """
        if not self._checked:
            self._checked = True
            self._compare_peers(self._on_all_ranks(_take_fingerprint))

    def save(self, folder: Path) -> None:
        """Save the rows of this rank, unless a peer saves the same ones.

        Args:
            folder: Folder to save into; peers with different parts of the samples take a subfolder each.

        Raises:
            BatchError: Peers hold different rows.
            CheckpointError: As for `Rehearsal.save`, or another rank failed.
        """
        reports = self._on_all_ranks(_take_fingerprint)
        self._compare_peers(reports)
        if self._rehearsal is not None and reports[dist.get_rank()].place is not None:
            # Groups of peers have drawn a run each, and only one of them writes.
            self._rehearsal.join_run(next(report.run for report in reports if report.place is not None))
            target = self._save_folder(folder, reports)
            self._rehearsal.save(target or folder, write=target is not None)

    def load(self, folder: Path, step: int | None = None, *, run: str | None = None, missing_ok: bool = False) -> bool:
        """Load the rows that this rank or a peer saved; see `Rehearsal.load`.

        Raises:
            BatchError: Peers hold different rows.
            CheckpointError: As for `Rehearsal.load`, or another rank failed, or not all ranks see the checkpoint.
        """
        reports = self._on_all_ranks(lambda rehearsal: _flush_files(rehearsal, folder))  # peers may still be writing
        folder = self._load_folder(folder, reports)
        reports = self._on_all_ranks(lambda rehearsal: _load_rank(rehearsal, folder, step, run, missing_ok=missing_ok))
        loaded = [report.loaded for report in reports if report.place is not None]
        if any(loaded) and not all(loaded):
            raise CheckpointError(
                f"only the ranks {[report.rank for report in reports if report.loaded]} found a rehearsal checkpoint "
                f"in {folder}; use a folder that all ranks share"
            )
        self._compare_peers(reports)
        return any(loaded)

    def _on_all_ranks(self, act: Callable[[Rehearsal], dict[str, Any]]) -> list[Report]:
        """Call `act` on every rank with a rehearsal, and gather the reports of all ranks.

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
                # The other ranks wait for this report.
                _gather_reports(replace(report, failure=f"{type(error).__name__}: {error}"))
                raise
        reports = _gather_reports(report)
        for failed in reports:
            if failed.failure:
                raise CheckpointError(f"rank {failed.rank} failed with {failed.failure}")
        return reports

    def _compare_peers(self, reports: Sequence[Report]) -> None:
        """Raise a BatchError on all ranks if peers hold different rows."""
        first: dict[int | None, Report] = {}
        for report in reports:
            peer = first.setdefault(report.place, report)
            mine, other = report.fingerprint, peer.fingerprint
            if mine is None or other is None:
                continue
            if mine.index != other.index or not (self._sharded or mine.fields == other.fields):
                raise BatchError(
                    f"the ranks {peer.rank} and {report.rank} hold different rows, and both have rank {report.place} "
                    "in their data-parallel groups (they are tensor-, sequence- or pipeline-parallel); give them the "
                    "same batches, as a sampler does that goes by the rank in the data-parallel group"
                )

    def _save_folder(self, folder: Path, reports: Sequence[Report]) -> Path | None:
        """Folder into which this rank saves; None where a peer saves the same rows.

        The first of the peers saves where all peers hold equal rows. If any peers hold different ones, all ranks save,
        each into the subfolder of its number among its peers.
        """
        mine = reports[dist.get_rank()]
        places = {report.place for report in reports}
        contents = {(report.place, report.fingerprint) for report in reports}
        if len(contents) > len(places):
            return folder / _subfolder_name(reports, dist.get_rank())
        first = next(report for report in reports if report.place == mine.place)
        return folder if first is mine else None

    def _load_folder(self, folder: Path, reports: Sequence[Report]) -> Path:
        """Folder from which this rank loads: that of its peers, or its own subfolder where any host has subfolders.

        Raises:
            CheckpointError: On all ranks, if a rank has no subfolder of its own on any host.
        """
        saved = sorted({name for report in reports for name in report.subfolders})
        if not saved:
            return folder
        names = {report.rank: _subfolder_name(reports, report.rank) for report in reports if report.place is not None}
        missing = sorted({name for name in names.values() if name not in saved})
        if missing:
            raise CheckpointError(
                f"{folder} has parts of samples, in {saved}, and none for this job ({missing[0]}); load it with as "
                "many sequence-parallel ranks as when it was saved"
            )
        return folder / names.get(dist.get_rank(), "")


def _subfolder_name(reports: Sequence[Report], rank: int) -> str:
    """Subfolder of a rank where peers hold different parts of the samples."""
    peers = [report.rank for report in reports if report.place == reports[rank].place]
    return f"rehearsal-peer{peers.index(rank)}-of-{len(peers)}"


def check_sequence_parallelism(engine: Any, config: RehearsalConfig) -> None:
    """Refuse settings that depend on the content of rows, where ranks may have different parts of them.

    Args:
        engine: A DeepSpeed engine.
        config: The `rehearsal` section.

    Raises:
        ConfigError: Peers would keep or see different rows with this section.
    """
    by_content = {
        "rehearsal.padding": config.padding is not None,
        "rehearsal.non_finite 'skip'": config.non_finite == "skip",
        "rehearsal.buffer.preload": config.buffer.preload is not None,
        "rehearsal.buffer.deduplicate": config.buffer.deduplicate,
        "rehearsal.buffer.score_by 'loss'": config.buffer.by_loss,
        "rehearsal.retrieval.module": config.retrieval is not None and config.retrieval.module is not None,
        "rehearsal.ratio.budget": config.ratio_budget is not None,
        "rehearsal.sampling.weights 'forgetting'": config.sampling.weights == "forgetting",
        "rehearsal.guard.action 'raise_ratio'": config.guard is not None and config.guard.action == "raise_ratio",
    }
    used_keys = [key for key, used in by_content.items() if used]
    if used_keys and engine.sequence_parallel_size > 1:
        raise ConfigError(
            f"{' and '.join(used_keys)} goes by the content of rows, of which sequence-parallel ranks may have "
            "different parts, so that they would not keep and replay the same ones; leave it out"
        )


def peers_of(engine: Any, rehearsal: Rehearsal | None, ranks: Sequence[int]) -> Peers | None:
    """The peers of this rank; None where every rank of the job sees other samples.

    Args:
        engine: A DeepSpeed engine.
        rehearsal: As for `Peers`.
        ranks: Result of `data_parallel_ranks`.
    """
    if len(ranks) == dist.get_world_size():
        return None
    return Peers(rehearsal, ranks, sharded=engine.sequence_parallel_size > 1)


def data_parallel_ranks(engine: Any) -> list[int]:
    """Ranks of the job in the data-parallel group of this rank, in the order of the samples.

    Args:
        engine: A DeepSpeed engine.

    Raises:
        ConfigError: The engine has no such group, and its sequence-parallel groups are no runs of ranks.
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


def _take_fingerprint(rehearsal: Rehearsal) -> dict[str, Any]:
    return {"fingerprint": rehearsal.fingerprint(), "run": rehearsal.run}


def _flush_files(rehearsal: Rehearsal, folder: Path) -> dict[str, Any]:
    rehearsal.flush()
    return {"subfolders": tuple(sorted(path.name for path in folder.glob("rehearsal-peer*-of-*")))}


def _load_rank(
    rehearsal: Rehearsal, folder: Path, step: int | None, run: str | None, *, missing_ok: bool
) -> dict[str, Any]:
    loaded = rehearsal.load(folder, step, run=run, missing_ok=missing_ok)
    return {"fingerprint": rehearsal.fingerprint(), "loaded": loaded}


def _gather_reports(report: Report) -> list[Report]:
    """The reports of all ranks, by rank."""
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports
