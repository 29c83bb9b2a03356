"""Which files of a folder a rank removes once it has written new ones.

A rank looks after its own files, and after those of ranks that the job has no more. In a folder that all ranks share,
rank `r` of `n` takes the gone ranks `r`, `r + n`, ... On the disk of one host, the lowest rank that saves there takes
those that would fall to a rank elsewhere::

    4 ranks on two disks became 2       disk 1: old ranks 0 1, new rank 0     disk 2: old ranks 2 3, new rank 1
    rank 0 looks after                  0 1 (1 would be of rank 1, which saves nothing here)
    rank 1 looks after                                                        2 3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rehearsal_plugin.checkpoint.format import RankFile, Stamp, list_files
from rehearsal_plugin.checkpoint.increments import ROWS_NAME, listed_parts
from rehearsal_plugin.checkpoint.timeline import stamp_or_none
from rehearsal_plugin.errors import CheckpointError

__all__ = ["next_number", "outlived_files", "remove_unused_rows", "stamps_of_rank"]


def stamps_of_rank(folder: Path, rank_file: RankFile) -> dict[RankFile, Stamp]:
    """The stamps of the files in a folder that the rank of `rank_file` looks after.

    Files that cannot be read have an empty stamp.
    """
    try:
        listed = list_files(folder)
    except CheckpointError:
        return {}  # the save says what is wrong with the folder
    savers = _savers(listed, rank_file)
    mine = [old for old in listed if _looks_after(rank_file, old.rank, old.size, savers)]
    return {old: stamp_or_none(folder, old) or Stamp() for old in mine}


def next_number(stamps: Mapping[RankFile, Stamp]) -> int:
    """The number of the next save, out of the result of `stamps_of_rank`."""
    return 1 + max((stamp.number for stamp in stamps.values()), default=0)


def outlived_files(stamps: Mapping[RankFile, Stamp], new: RankFile, run: str | None, kept: int) -> list[RankFile]:
    """The files of a run that are to go once `new` is written: neither the last ones of the run nor of its timeline.

    Args:
        stamps: The files before, see `stamps_of_rank`.
        new: The file that was written last.
        run: Its run; files that name none count to the past of any at a later step.
        kept: Checkpoints that stay of either, the new one among them.
    """
    own = [
        (stamp.number, old)
        for old, stamp in stamps.items()
        if old.step != new.step and (stamp.run == run is not None or (stamp.run is None and old.step < new.step))
    ]
    by_age = [old for _, old in sorted(own, reverse=True)]
    steps, past = list(dict.fromkeys(old.step for old in by_age)), [new.step]
    for step in steps:
        if step < past[-1]:  # others are a future that the run went back from
            past.append(step)
    staying = {*steps[: kept - 1], *past[:kept]}
    return [old for old in by_age if old.step not in staying]


def remove_unused_rows(folder: Path, rank_file: RankFile) -> None:
    """Remove the files of rows that no checkpoint in the folder lists, of those that this rank looks after."""
    try:
        listed = list_files(folder)
        savers = _savers(listed, rank_file)
        mine = [old for old in listed if _looks_after(rank_file, old.rank, old.size, savers)]
        used = {part.name for old in mine for part in listed_parts(folder, old)}
    except (CheckpointError, LookupError, TypeError, ValueError):
        return  # a file that cannot be read may list them
    for entry in folder.iterdir():
        match = ROWS_NAME.fullmatch(entry.name)
        if match and entry.name not in used and _looks_after(rank_file, int(match[1]), int(match[2]), savers):
            entry.unlink(missing_ok=True)


def _savers(listed: Sequence[RankFile], rank_file: RankFile) -> set[int]:
    """The ranks of this job that save into the folder."""
    return {rank_file.rank, *(old.rank for old in listed if old.size == rank_file.size)}


def _looks_after(rank_file: RankFile, rank: int, size: int, savers: set[int]) -> bool:
    """Whether the rank of `rank_file` removes files of `rank` of `size` ranks."""
    if size == rank_file.size:  # never those of another rank, which may be writing
        return rank == rank_file.rank
    keeper = rank % rank_file.size
    return rank_file.rank == (keeper if keeper in savers else min(savers))
