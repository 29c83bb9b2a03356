"""Ranks killed while they save, full disks as the system reports them, deleted files: what was saved stays good."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.checkpoint import format as files
from rehearsal_plugin.errors import CheckpointError
from tests.helpers.exits import run_exits
from tests.helpers.faults import SIZE, WANTED, connect, missing, report, reported, section, train, variant_of
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, new_batch

pytestmark = pytest.mark.fault

FIRST, SECOND, LAST = 6, 9, 12  # steps of the saves that succeed and fail, and of the last one
ROOM = 1024  # bytes that a file may have on a full disk; less than any save needs
Record = Callable[[str, object], None]

SETTINGS: dict[str, dict[str, Any]] = {
    "at once": {},
    "in the background": {"asynchronous": True},
    "in parts": {"incremental": True},
    "in parts in the background": {"asynchronous": True, "incremental": True},
}


def ids(rank: int, steps: int) -> list[int]:
    """All samples that a rank offers in its first steps."""
    return [row for step in range(steps) for row in new_batch(rank, step, SIZE)["id"].tolist()]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond `ROOM` bytes; the system says so as soon as one would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- killed in a save ------------------------------------------------------------------------------------------------

KILLED = [(setting, moment) for setting in SETTINGS for moment in ("half written", "not renamed yet")]
FOLDER = "REHEARSAL_TEST_FOLDER"  # variable that names where the ranks that die save


def die_in_a_save(world_rank: int) -> None:
    (setting, moment), group = variant_of(KILLED)
    rank, folder = dist.get_rank(group), Path(os.environ[FOLDER], str(world_rank // 2))
    with Rehearsal(section(checkpoint=SETTINGS[setting]), connect(group)) as rehearsal:
        for step in range(SECOND):
            if step == FIRST:
                rehearsal.save(folder)
            rehearsal.update(new_batch(rank, step, SIZE))
        if rank == 1:
            rehearsal._saver.wait()
            die(moment)
        rehearsal.save(folder)
        if rank == 1:
            rehearsal._saver.wait()  # for the background to reach its end
        report(train(rehearsal, rank, range(SECOND, LAST)))


def die(moment: str) -> None:
    """Have the next save kill this process, half of its file written or all of it."""

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        whole = safetensors.torch.save(tensors, metadata)
        path.write_bytes(whole[: len(whole) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def never(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    name, fatal = ("save_file", half) if moment == "half written" else ("_fsync", never)
    pytest.MonkeyPatch().setattr(files, name, fatal)


def resume_after_a_death(base: Path) -> dict[str, Any]:
    (setting, _), group = variant_of(KILLED)
    rank, folder = dist.get_rank(group), base / str(dist.get_rank() // 2)
    rehearsal = Rehearsal(section(checkpoint=SETTINGS[setting]), connect(group))
    rehearsal.load(folder)
    at_start = {"from": rehearsal.steps, "lost": missing(rehearsal, ids(rank, FIRST))}
    for step in range(FIRST, SECOND):
        rehearsal.update(new_batch(rank, step, SIZE))
    rehearsal.save(folder)
    outcome = train(rehearsal, rank, range(SECOND, LAST))
    return {**outcome, **at_start, "lost later": missing(rehearsal, ids(rank, LAST))}


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[list[int]], list[Any]]:
    """Exit codes of the ranks of all jobs, the sizes of unfinished files in their folders, and the jobs after them."""
    base = tmp_path_factory.mktemp("saves")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(base))
        ends = run_exits([die_in_a_save], size=2 * len(KILLED))[die_in_a_save.__name__]
    left = [[path.stat().st_size for path in (base / str(n)).glob("*.partial/*")] for n in range(len(KILLED))]
    resumed = run_ranks(resume_after_a_death, 2 * len(KILLED), base, timeout_s=60)
    assert not list(base.glob("*/*.partial")), "the next save removes them"
    return ends, left, resumed


@pytest.mark.parametrize(("setting", "moment"), KILLED)
def test_a_rank_that_is_killed_while_it_saves_leaves_the_checkpoint_before(
    setting: str, moment: str, deaths: Any, record_property: Record
) -> None:
    number = KILLED.index((setting, moment))
    ends, left, resumed = deaths
    survivor, victim = ends[2 * number : 2 * number + 2]
    assert victim["code"] == -signal.SIGKILL, victim["stderr"]
    assert len(left[number]) == 1, "it died before its first file had its name"
    assert left[number][0] > 0
    assert survivor["code"] == 0, survivor["stderr"]
    outcome = reported(survivor)
    assert outcome["error"].startswith("ExchangeError: the exchange of ")
    pair = resumed[2 * number : 2 * number + 2]
    lost = [row for rank in pair for row in rank["lost"] + rank["lost later"]]
    record_property("rows_lost", len(lost) + len(outcome["lost"]))
    assert lost == outcome["lost"] == []
    for rank in pair:
        assert rank["from"] == FIRST
        assert rank["error"] == ""
        assert rank["intact"]
        assert [len(row) for row in rank["ids"]] == [SIZE + WANTED] * (LAST - SECOND)


# --- a full disk -----------------------------------------------------------------------------------------------------


def fill_the_disk(base: Path) -> dict[str, Any]:
    """Rank 1 has no room for its second save."""
    setting, group = variant_of(list(SETTINGS))
    rank, folder = dist.get_rank(group), base / str(dist.get_rank() // 2)
    keys = section(checkpoint=SETTINGS[setting])
    rehearsal = Rehearsal(keys, connect(group))
    refused = ""
    loaded: list[tuple[int, list[int]]] = []

    def make(rank: int, step: int, size: int) -> Batch:
        nonlocal refused
        if step == FIRST:
            rehearsal.save(folder)
        if step == SECOND:
            rehearsal._saver.wait()
            refused = refused_save(rehearsal, folder) if rank == 1 else ""
            loaded.append(load(keys, group, folder, ids(rank, FIRST)))
        if step == LAST - 1:
            rehearsal.save(folder)
        return new_batch(rank, step, size)

    outcome = train(rehearsal, rank, range(LAST), make)
    loaded.append(load(keys, group, folder, ids(rank, LAST - 1)))
    return {**outcome, "refused": refused, "loaded": loaded, "folder": str(folder)}


def refused_save(rehearsal: Rehearsal, folder: Path) -> str:
    """The error of a save for which there is no room."""
    with full_disk():
        try:
            rehearsal.save(folder)
            rehearsal.save(folder)  # tells what became of one in the background
        except CheckpointError as error:
            return str(error)
    return ""


def load(keys: dict[str, Any], group: Any, folder: Path, expected: list[int]) -> tuple[int, list[int]]:
    """The step of the newest checkpoint, and what it lacks of this rank's samples."""
    with Rehearsal(keys, connect(group)) as restored:
        restored.load(folder)
        return restored.steps, missing(restored, expected)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(fill_the_disk, 2 * len(SETTINGS), tmp_path_factory.mktemp("full"), timeout_s=60)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_full_disk_is_an_error_that_names_the_file_and_training_goes_on(
    setting: str, filled: list[dict[str, Any]], record_property: Record
) -> None:
    number = 2 * list(SETTINGS).index(setting)
    pair = filled[number : number + 2]
    lost = [
        row for outcome in pair for rows in (outcome["lost"], *(rows for _, rows in outcome["loaded"])) for row in rows
    ]
    record_property("rows_lost", len(lost))
    assert lost == []
    refused = pair[1]["refused"]
    assert f"{pair[1]['folder']}/rehearsal-step{SECOND}-rank1-of-2" in refused
    assert "File too large" in refused
    for outcome in pair:
        assert [step for step, _ in outcome["loaded"]] == [FIRST, LAST - 1]
        assert outcome["error"] == ""
        assert outcome["intact"]
        assert len(outcome["ids"]) == LAST


# --- a file of rows that is deleted ----------------------------------------------------------------------------------


def delete_the_rows(folder: Path, launch: str) -> dict[str, Any]:
    """Every rank's file of rows is deleted in the middle of the run."""
    rank, rows = dist.get_rank(), folder / "rows"
    buffer = {"capacity": 400, "storage": "mmap", "path": str(rows)}
    keys = section(buffer=buffer, exchange={"launch": launch, "timeout_s": 20})
    rehearsal = Rehearsal(keys)

    def make(rank: int, step: int, size: int) -> Batch:
        if step == FIRST:
            (rows / f"rows.rank{rank}.bin").unlink()
        if step == SECOND:
            rehearsal.save(folder)
        return new_batch(rank, step, size)

    outcome = train(rehearsal, rank, range(LAST), make)
    return {**outcome, "loaded": load(keys, None, folder, ids(rank, SECOND))}


@pytest.mark.parametrize("launch", ["thread", "inline"])
def test_rows_in_a_file_that_is_deleted_under_the_run_stay(
    launch: str, tmp_path: Path, record_property: Record
) -> None:
    ranks = run_ranks(delete_the_rows, 2, tmp_path, launch, timeout_s=60)
    record_property("rows_lost", sum(len(outcome["lost"]) + len(outcome["loaded"][1]) for outcome in ranks))
    for outcome in ranks:
        assert outcome["error"] == ""
        assert outcome["lost"] == []
        assert outcome["intact"]
        assert [len(row) for row in outcome["ids"][2:]] == [SIZE + WANTED] * (LAST - 2)
        assert outcome["loaded"] == (SECOND, [])
