"""Which checkpoint of a folder is the newest; `retention` says which ones a job may remove.

The stamp of every file names the run, a random text that a job keeps over all its restarts, and numbers the saves of
a folder in the order in which they were written. Steps alone would not do: a folder may hold a longer run of another
day, and a run that went back after a bad stretch saves at lower steps than before. For example, a run that saved at
steps 10 to 40 went back to 20 and saved at 25, beside the files of another run::

    step      10  20  30  40  25      50  60        (other run)
    number     3   4   5   6   7       1   2
    timeline   x   x           x                    of the save at 25: its own run, steps falling with the numbers

A file of an earlier release names no run and has no number: its time says whether it is newer than the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rehearsal_plugin.checkpoint.format import RankFile, Stamp, list_files, read_stamp
from rehearsal_plugin.errors import CheckpointError

__all__ = ["find_newest", "find_own", "of_another_run", "stamp_or_none"]


def find_newest(folder: Path, step: int | None = None, run: str | None = None) -> list[RankFile] | None:
    """The files of the checkpoint that was written last of those that are complete, by rank; None without files.

    Args:
        folder: Folder of checkpoints.
        step: Take only checkpoints of this step; None for any.
        run: Take only checkpoints of this run, or of one that they do not name; None for any.

    Raises:
        CheckpointError: There are files, and none of the checkpoints is complete, or none is of that step and run.
    """
    sets = _sets_of(folder)
    matching = {key: files for key, files in sets.items() if step in (None, key[0])}
    if step is not None and run is not None and sets and not matching:
        raise CheckpointError(of_another_run(folder, step, sorted({key[0] for key in sets})))
    complete = [files for (_, size), files in matching.items() if len(files) == size]
    if matching and not complete:
        raise CheckpointError(_incomplete(folder, matching))
    if not complete:
        return None
    if run is None and len(complete) == 1:
        return complete[0]
    stamps = {files[0]: stamp_or_none(folder, files[0]) for files in complete}
    of_run = [files for files in complete if run is None or _may_be_of(stamps[files[0]], run)]
    if run is not None and not of_run:  # of ranks that are runs by themselves, this one need not be the first
        of_run = [files for files in complete if any(_may_be_of(stamp_or_none(folder, file), run) for file in files)]
    if not of_run:
        raise CheckpointError(of_another_run(folder, step, sorted({files[0].step for files in complete})))
    return _written_last(folder, of_run, stamps)


def find_own(folder: Path, rank: int, size: int, step: int | None, run: str | None) -> RankFile | None:
    """The file of one rank that it wrote last among `size`, whether those of the others are there or not.

    Args:
        folder: Folder of checkpoints.
        rank: The rank.
        size: Number of ranks that saved.
        step: As for `find_newest`.
        run: As for `find_newest`.
    """
    own = [old for old in list_files(folder) if (old.rank, old.size) == (rank, size) and step in (None, old.step)]
    stamps = {old: stamp_or_none(folder, old) for old in own}
    of_run = [[old] for old in own if run is None or _may_be_of(stamps[old], run)]
    return _written_last(folder, of_run, stamps)[0] if of_run else None


def _sets_of(folder: Path) -> dict[tuple[int, int], list[RankFile]]:
    """The files of each step and number of ranks."""
    sets: dict[tuple[int, int], list[RankFile]] = {}
    for rank_file in list_files(folder):
        sets.setdefault((rank_file.step, rank_file.size), []).append(rank_file)
    return sets


def _written_last(
    folder: Path, complete: Sequence[list[RankFile]], stamps: Mapping[RankFile, Stamp | None]
) -> list[RankFile]:
    """The checkpoint with the highest number; one without any, or that cannot be read, counts by its time."""
    numbers = {files[0]: _number(stamps[files[0]]) for files in complete}
    if not any(numbers.values()):
        return max(complete)
    newest = max(complete, key=lambda files: (numbers[files[0]], files))
    others = [files for files in complete if not numbers[files[0]]]
    return max([newest, *others], key=lambda files: (_time_of(folder / files[0].name), files == newest))


def _number(stamp: Stamp | None) -> int:
    return 0 if stamp is None else stamp.number


def _time_of(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 for one that is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _may_be_of(stamp: Stamp | None, run: str) -> bool:
    return stamp is None or stamp.run in (None, run)


def stamp_or_none(folder: Path, rank_file: RankFile) -> Stamp | None:
    """The stamp of a file; None where it cannot be read, which a load of it says."""
    try:
        return read_stamp(folder, rank_file)
    except CheckpointError:
        return None


def _incomplete(folder: Path, sets: Mapping[tuple[int, int], list[RankFile]]) -> str:
    step, size = max(sets)
    ranks = {rank_file.rank for rank_file in sets[step, size]}
    missing = next(rank for rank in range(size) if rank not in ranks)
    return (
        f"{folder} has no complete rehearsal checkpoint: of step {step}, {len(ranks)} of {size} files are there, "
        f"and {RankFile(step, size, missing).name} is missing; copy the files of all ranks into one folder, or "
        "give an earlier checkpoint"
    )


def of_another_run(folder: Path, step: int | None, steps: Sequence[int]) -> str:
    """The message where a folder has files of these steps, and none of the run of the model."""
    return (
        f"{folder} has the model of step {step} and rehearsal files of another run (steps {steps}), so the buffer "
        "would not be that of the model; load an earlier checkpoint, or remove the files of the other run and start "
        "with an empty buffer"
    )
