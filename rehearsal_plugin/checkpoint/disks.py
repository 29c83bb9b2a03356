"""The newest checkpoint whose files lie on the disks of several hosts.

Every rank lists the checkpoint files in its own folder and tells all others. So all know who has which file, and choose
the same checkpoint by the rules of `timeline`, as if the files lay in one folder::

    rank 0 on host1   step 20: rank 0 of 2                step 30: rank 0 of 2
    rank 1 on host2   step 20: rank 1 of 2                                          chosen: step 20
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal_plugin.checkpoint.format import RankFile, read_header, read_stamp
from rehearsal_plugin.checkpoint.increments import listed_parts
from rehearsal_plugin.checkpoint.job_settings import goes_on
from rehearsal_plugin.checkpoint.reshard import FileRows
from rehearsal_plugin.checkpoint.timeline import of_another_run
from rehearsal_plugin.errors import CheckpointError

__all__ = ["Disk", "DiskFile", "SpreadCheckpoint", "choose_checkpoint", "describe_disks", "list_disk"]

NO_ROWS = FileRows(0, False)

MOST_DESCRIBED = 6
"""Disks that a message tells of."""


@dataclass(frozen=True)
class DiskFile:
    """One rank's checkpoint on a disk.

    Attributes:
        rank_file: Its main file.
        run: The run that wrote it; None where it names none, or cannot be read.
        local: Whether every rank was a run by itself.
        number: See `Stamp`.
        time: When it was written, in nanoseconds.
        digest: See `Record`.
        rows: The rows in it.
        goes_on: Whether it holds all state of a job with the settings of this one.
        files: Names and bytes of the main file and of those with its rows.
    """

    rank_file: RankFile
    run: str | None = None
    local: bool = False
    number: int = 0
    time: int = 0
    digest: int = 0
    rows: FileRows = NO_ROWS
    goes_on: bool = False
    files: tuple[tuple[str, int], ...] = ()

    def may_be_of(self, run: str | None) -> bool:
        """Whether it may be of a run: it is, it names none, or each of its ranks is a run by itself."""
        return self.local or None in (run, self.run) or self.run == run


@dataclass(frozen=True)
class Disk:
    """The folder of one rank, and the checkpoint that it asks for.

    Attributes:
        host: Name of its host.
        folder: The folder.
        step: Step that it asks for; None for any.
        run: Run that it asks for; None for any.
        files: The checkpoint files in the folder.
    """

    host: str
    folder: str
    step: int | None
    run: str | None
    files: tuple[DiskFile, ...]

    def to_json(self) -> str:
        """The text that other ranks get."""
        files = [
            [
                [file.rank_file.step, file.rank_file.size, file.rank_file.rank],
                [file.run, file.local, file.number, file.time, file.digest],
                [file.rows.count, file.rows.has_layout],
                file.goes_on,
                file.files,
            ]
            for file in self.files
        ]
        return json.dumps([self.host, self.folder, self.step, self.run, files])

    @classmethod
    def from_json(cls, text: str) -> Disk:
        """The disk in a text of `to_json`."""
        host, folder, step, run, files = json.loads(text)
        return cls(host, folder, step, run, tuple(_file_from_json(*values) for values in files))


@dataclass(frozen=True)
class SpreadCheckpoint:
    """A checkpoint whose files lie on any disks.

    Attributes:
        files: Its files, by the rank that saved them.
        holders: The ranks of this job that can read each of them, ascending.
    """

    files: tuple[DiskFile, ...]
    holders: tuple[tuple[int, ...], ...]

    @property
    def step(self) -> int:
        """Step at which it was saved."""
        return self.files[0].rank_file.step

    @property
    def number(self) -> int:
        """Number of the save; disks may count differently."""
        return max(file.number for file in self.files)


def list_disk(
    folder: Path, names: Sequence[RankFile], step: int | None, run: str | None, job: Mapping[str, Any]
) -> Disk:
    """The checkpoint files in this rank's folder, for a rank that asks for this step and run.

    Args:
        folder: The folder.
        names: The files, see `list_files`.
        step: Step of the checkpoint that is asked for; None for any.
        run: Run that saved it; None for any.
        job: Settings of this job, see `job_settings`.
    """
    files = tuple(_describe_file(folder, rank_file, job) for rank_file in names)
    return Disk(socket.gethostname(), str(folder), step, run, files)


def choose_checkpoint(disks: Sequence[Disk]) -> SpreadCheckpoint | None:
    """The checkpoint that was written last of those that are complete on all disks together; None without files.

    Args:
        disks: Those of all ranks, by rank.

    Raises:
        CheckpointError: Ranks ask for different steps, no checkpoint is complete, or none is of the run asked for.
    """
    step, steps = disks[0].step, sorted({file.rank_file.step for disk in disks for file in disk.files})
    if any(disk.step != step for disk in disks):
        asked = ", ".join(f"rank {rank}: step {disk.step}" for rank, disk in enumerate(disks))
        raise CheckpointError(f"the ranks ask for different checkpoints ({asked}); give all the same step")
    runs = [disk.run for disk in disks if disk.run is not None]
    if step not in (None, *steps) and runs and steps:
        raise CheckpointError(of_another_run(Path(disks[0].folder), step, steps))
    if not steps or step not in (None, *steps):
        return None
    complete = list(_complete_checkpoints(disks, step))
    if not complete:
        raise CheckpointError(_incomplete(disks, step))
    of_run = [found for found in complete if all(any(file.may_be_of(run) for file in found.files) for run in runs)]
    if not of_run:
        raise CheckpointError(of_another_run(Path(disks[0].folder), step, sorted({found.step for found in complete})))
    return _written_last(of_run)


def describe_disks(disks: Sequence[Disk], step: int, size: int) -> str:
    """Who has which files of a checkpoint of `size` ranks, as in `rank 0 on host1 (/data) has those of ranks 0, 1`."""
    ranks: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for rank, disk in enumerate(disks):
        saved = (file.rank_file for file in disk.files)
        held = tuple(sorted(file.rank for file in saved if (file.step, file.size) == (step, size)))
        ranks.setdefault((disk.host, disk.folder, held), []).append(rank)
    words = [
        f"rank{'s' * (len(readers) > 1)} {_numbers(readers)} on {host} ({folder}) "
        + (f"has those of ranks {_numbers(held)}" if held else "has none")
        for (host, folder, held), readers in ranks.items()
    ]
    more = len(words) - MOST_DESCRIBED
    return "; ".join(words[:MOST_DESCRIBED]) + (f"; and so on for {more} more" if more > 0 else "")


def _describe_file(folder: Path, rank_file: RankFile, job: Mapping[str, Any]) -> DiskFile:
    """A file as its header tells; without a run and rows where that cannot be read, which a load of it says."""
    try:
        meta, stamp = read_header(folder, rank_file), read_stamp(folder, rank_file)
        return DiskFile(
            rank_file,
            stamp.run,
            meta["job"].get("scope") == "local",
            stamp.number,
            (folder / rank_file.name).stat().st_mtime_ns,
            int(meta["digest"]),
            FileRows(int(meta["count"]), meta["layout"] is not None),
            meta["state"]["progress"] is not None and goes_on(meta["job"], job),
            tuple(_sizes(folder, [rank_file.name, *(part.name for part in listed_parts(folder, rank_file))])),
        )
    except (CheckpointError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return DiskFile(rank_file, files=tuple(_sizes(folder, [rank_file.name])))


def _sizes(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    for name in names:
        with suppress(OSError):  # a file that is missing is missed by the load
            yield name, (folder / name).stat().st_size


def _file_from_json(place: Any, stamp: Any, rows: Any, whole: bool, files: Any) -> DiskFile:
    sizes = tuple((str(name), int(length)) for name, length in files)
    run, local, number, time, digest = stamp
    return DiskFile(RankFile(*place), run, local, number, time, digest, FileRows(*rows), whole, sizes)


def _complete_checkpoints(disks: Sequence[Disk], step: int | None) -> Iterator[SpreadCheckpoint]:
    """The checkpoints of a step of which every rank's file lies on a disk; of each run for itself."""
    sets: dict[tuple[int, int], list[tuple[int, DiskFile]]] = {}
    for holder, disk in enumerate(disks):
        for file in disk.files:
            if step in (None, file.rank_file.step):
                sets.setdefault((file.rank_file.step, file.rank_file.size), []).append((holder, file))
    for (_, size), held in sets.items():
        runs = sorted({file.run for _, file in held if file.run is not None and not file.local})
        for run in (*runs,) if runs else (None,):
            by_rank: list[list[tuple[int, DiskFile]]] = [[] for _ in range(size)]
            for holder, file in held:
                if file.may_be_of(run):
                    by_rank[file.rank_file.rank].append((holder, file))
            if all(by_rank):
                files = tuple(found[0][1] for found in by_rank)
                yield SpreadCheckpoint(files, tuple(tuple(holder for holder, _ in found) for found in by_rank))


def _written_last(complete: Sequence[SpreadCheckpoint]) -> SpreadCheckpoint:
    """As in `timeline`: the highest number; one without any counts by its time."""
    newest = max(complete, key=lambda found: (found.number, found.step, len(found.files)))
    others = [found for found in complete if not found.number]
    if not newest.number:
        return newest
    return max([newest, *others], key=lambda found: (found.files[0].time, found is newest))


def _incomplete(disks: Sequence[Disk], step: int | None) -> str:
    saved = {file.rank_file for disk in disks for file in disk.files if step in (None, file.rank_file.step)}
    newest = max(saved)
    ranks = {file.rank for file in saved if (file.step, file.size) == (newest.step, newest.size)}
    missing = next((rank for rank in range(newest.size) if rank not in ranks), None)
    holders = describe_disks(disks, newest.step, newest.size)
    if missing is None:
        return (
            f"the files of the checkpoint of step {newest.step} on the disks of the hosts were not saved together, but "
            f"by different runs: {holders}; remove those of one, or give an earlier step"
        )
    name = RankFile(newest.step, newest.size, missing).name
    return (
        f"the disks of the hosts have no complete rehearsal checkpoint: of step {newest.step}, {len(ranks)} of "
        f"{newest.size} files are there, and {name} is missing: {holders}; start on the hosts that saved, copy the "
        "missing file to any of them, or give an earlier checkpoint"
    )


def _numbers(ranks: Sequence[int]) -> str:
    """Ranks in words, the first of many."""
    return ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
