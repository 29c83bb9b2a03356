"""Which checkpoint the ranks of a job load, and in which way; all the same.

Each rank looks into its folder, and all compare their answers:

| answers | then |
|---|---|
| all see the same names of files | the folder is shared: the newest complete checkpoint in it |
| all have their own file of one save by as many ranks | each loads its own |
| else | they tell each other all files on their disks, and choose the newest complete checkpoint of all together |

The way is the highest number among the answers:

| way | when | the job then has |
|---|---|---|
| `EXACT` | as many ranks, equal `job_settings`, state of a job in the files | all state: it goes on bit for bit |
| `RESHARD` | other ranks or settings, files of rows alone, or a preload | rows, shared out between its ranks |
| `MISSING` | no checkpoint in the folder | an empty buffer, or an error |
| `FAILED` | a rank met an error | an error on every rank |
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rehearsal_plugin.checkpoint.disks import Disk, SpreadCheckpoint, choose_checkpoint, describe_disks, list_disk
from rehearsal_plugin.checkpoint.format import RankFile, list_files, read_header, read_stamp
from rehearsal_plugin.checkpoint.job_settings import goes_on
from rehearsal_plugin.checkpoint.loading import JobParts, check_file
from rehearsal_plugin.checkpoint.reshard import deal_files
from rehearsal_plugin.checkpoint.saved_file import SavedFile, report_contradictions
from rehearsal_plugin.checkpoint.timeline import find_newest, find_own
from rehearsal_plugin.errors import CheckpointError, ExchangeError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator

__all__ = ["MISSING", "Agreement", "find_checkpoint", "on_all_ranks"]

LOG = logging.getLogger(__name__)

EXACT, RESHARD, MISSING, FAILED = range(4)
"""Ways of a load; see the table above."""


class Answer(NamedTuple):
    """What a rank finds in its folder.

    Attributes:
        way: The way in which it can load; `MISSING` also where it has files of other ranks only.
        step: Step of the checkpoint.
        ranks: Number of ranks that saved it.
        digest: See `Record`; 0 where it does not matter.
        run: Number of the run that saved it; 0 where files name none, or each rank was one by itself.
        refused: Whether no checkpoint is complete in its folder, or none is of the run.
        names: Digest of the names of all checkpoint files in the folder.
    """

    way: int
    step: int = 0
    ranks: int = 0
    digest: int = 0
    run: int = 0
    refused: int = 0
    names: int = 0


@dataclass(frozen=True)
class Agreement:
    """What all ranks load.

    Attributes:
        way: The way.
        ranks: Ranks of this job.
        files: Files of the checkpoint by rank, all of which this rank can read as far as it needs them.
        spread: Set where ranks need files of other disks; `files` is empty then.
        last_number: The highest number of a save on any disk, where `spread` is set.
    """

    way: int
    ranks: int
    files: Sequence[SavedFile] = ()
    spread: SpreadCheckpoint | None = None
    last_number: int = 0

    @property
    def exact(self) -> bool:
        """Whether the job goes on bit for bit."""
        return self.way == EXACT

    def needed(self, rank: int) -> list[int]:
        """Numbers of the files of `spread` that a rank reads: its own, and those with its share of the rows."""
        assert self.spread is not None
        rows = [file.rows for file in self.spread.files]
        shares = [] if self.exact else deal_files(rows, rank, self.ranks)
        return sorted({rank % len(rows), *(share.file for share in shares)})


def find_checkpoint(folder: Path, step: int | None, run: str | None, parts: JobParts) -> Agreement:
    """The newest complete checkpoint, and the way to load it that all ranks agree on.

    Args:
        folder: Folder of checkpoints, one for all ranks or one on each host.
        step: Step of the checkpoint; None for any.
        run: Run that saved it; None for any.
        parts: The job. Of a new one, the rows alone are loaded.

    Raises:
        CheckpointError: Files are missing, or a rank cannot read them.
        ExchangeError: A rank does not answer.
    """
    coordinator, refusal = parts.coordinator, None
    with _failure_told(coordinator):
        names = list_files(folder)
        try:
            files = [(folder, rank_file) for rank_file in find_newest(folder, step, run) or []]
        except CheckpointError as error:  # it is not complete in this folder, or is of another run
            refusal, files = error, _own_files(folder, step, run, coordinator)
        answer = _inspect_files(files, parts)._replace(refused=refusal is not None, names=_digest_of(names))
    answers = _compare_answers(coordinator, answer, folder)
    if len({of_rank.names for of_rank in answers}) == 1:
        if refusal is not None:
            raise refusal
        return Agreement(_common_way(answers, folder), len(answers), files)
    if answer.ranks == len(answers) and answer.way == EXACT and len({of_rank[:5] for of_rank in answers}) == 1:
        return Agreement(EXACT, len(answers), _files_of(folder, files[0][1]))
    return _find_on_disks(list_disk(folder, names, step, run, parts.settings), parts)


def on_all_ranks(load: Callable[[], None], folder: Path, coordinator: ReplayCoordinator) -> None:
    """Call `load`, as every rank does; an error on one is one on all.

    Raises:
        CheckpointError: Another rank failed.
        ExchangeError: A rank does not answer.
    """
    with _failure_told(coordinator):
        load()
    _compare_answers(coordinator, Answer(RESHARD), folder)


@contextmanager
def _failure_told(coordinator: ReplayCoordinator) -> Iterator[None]:
    """Tell the ranks that wait for an answer of an error inside of the context."""
    try:
        yield
    except ExchangeError:  # nobody hears it
        raise
    except Exception:
        coordinator.agree(*Answer(FAILED))
        raise


def _own_files(folder: Path, step: int | None, run: str | None, coordinator: ReplayCoordinator) -> list[SavedFile]:
    """The newest file that this rank saved among as many; its host may have no others."""
    ranks = coordinator.lifecycle
    own = find_own(folder, ranks.rank, ranks.size, step, run)
    return [] if own is None else [(folder, own)]


def _files_of(folder: Path, own: RankFile) -> list[SavedFile]:
    """The files of the checkpoint that one file is part of, by rank."""
    return [(folder, replace(own, rank=rank)) for rank in range(own.size)]


def _digest_of(names: Sequence[RankFile]) -> int:
    text = "\n".join(rank_file.name for rank_file in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _inspect_files(files: Sequence[SavedFile], parts: JobParts) -> Answer:
    """This rank's answer, by the file that it would load."""
    if not files:
        return Answer(MISSING)
    ranks, only_rows = parts.coordinator.lifecycle, parts.new_on is not None
    file = files[ranks.rank % len(files)]
    with report_contradictions(file[0] / file[1].name):
        meta = read_header(*file)
        check_file(meta, parts.settings, file)
        as_many = file[1].size == ranks.size
        same_job = as_many and meta["state"]["progress"] is not None and goes_on(meta["job"], parts.settings)
        exact, digest = same_job and not only_rows, int(meta["digest"])
        if digest.bit_length() > 63:
            raise ValueError("a digest of more than 64 bits")
        # Of as many ranks each looks at one file, and the answers are compared. Rows that are shared out need not have
        # been saved together, but by one run.
        run = 0 if only_rows else _common_run([file] if as_many else files)
        return Answer(EXACT if exact else RESHARD, file[1].step, file[1].size, digest if exact else 0, run)


def _compare_answers(coordinator: ReplayCoordinator, answer: Answer, folder: Path) -> list[Answer]:
    """The answers of all ranks, by rank.

    Raises:
        CheckpointError: A rank failed, or refuses what all see.
    """
    answers = [Answer(*values) for values in coordinator.agree(*answer)]
    shared = len({of_rank.names for of_rank in answers}) == 1
    failed = [rank for rank, of_rank in enumerate(answers) if of_rank.way == FAILED or (shared and of_rank.refused)]
    if failed and not (shared and answer.refused):
        raise CheckpointError(f"rank {failed[0]} cannot load the checkpoint in {folder}; see its log")
    return answers


def _common_way(answers: Sequence[Answer], folder: Path) -> int:
    """The way that is open to all ranks that see the same files.

    Raises:
        CheckpointError: Ranks see different checkpoints, or files of different saves are mixed.
    """
    ways = [answer.way for answer in answers]
    if len({(answer.way == MISSING, *answer[1:3]) for answer in answers}) > 1:
        by_rank = ", ".join(f"rank {rank}: step {answer.step} of {answer.ranks}" for rank, answer in enumerate(answers))
        raise CheckpointError(
            f"the ranks see different checkpoints in {folder} ({by_rank}); wait until all have saved, or name the "
            "same step on all"
        )
    apart = RESHARD not in ways and len({answer.digest for answer in answers}) > 1
    if apart or len({answer.run for answer in answers}) > 1:
        raise CheckpointError(_saved_apart(folder))
    return max(ways)


def _find_on_disks(disk: Disk, parts: JobParts) -> Agreement:
    """The newest checkpoint of which every file lies on the disk of some rank.

    Raises:
        CheckpointError: Files are missing, or were not saved together.
    """
    coordinator = parts.coordinator
    disks = [Disk.from_json(text) for text in coordinator.gather_texts(disk.to_json())]
    spread = choose_checkpoint(disks)
    if spread is None:
        return Agreement(MISSING, len(disks))
    as_many = len(spread.files) == len(disks) and parts.new_on is None
    exact = as_many and all(file.goes_on for file in spread.files)
    if exact and len({file.digest for file in spread.files}) > 1:
        raise CheckpointError(_saved_apart(Path(disk.folder)))
    if coordinator.lifecycle.rank == 0:
        holders = describe_disks(disks, spread.step, len(spread.files))
        LOG.info("the checkpoint of step %d lies on several disks: %s", spread.step, holders)
    last_number = max(file.number for each in disks for file in each.files)
    return Agreement(EXACT if exact else RESHARD, len(disks), spread=spread, last_number=last_number)


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
