"""A job says once whether each host has a folder of its own, and asks no rank for it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.checkpoint import shared_folder
from rehearsal_plugin.checkpoint.format import RankFile
from rehearsal_plugin.checkpoint.shared_folder import SharedFolderCheck
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import new_batch

MESSAGE = "does not see the files of rank 0"
LAST = RankFile(5, 3, 2)


def saved(folder: Path, *ranks: int, step: int = 5) -> None:
    folder.mkdir(exist_ok=True)
    for rank in ranks:
        (folder / RankFile(step, 3, rank).name).touch()


def lines(caplog: pytest.LogCaptureFixture) -> int:
    return sum(MESSAGE in record.message for record in caplog.records)


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, shared_folder.__name__)


def test_a_folder_without_rank_0_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check = SharedFolderCheck()
    for step in (5, 6, 7):
        saved(tmp_path / str(step), 2, step=step)
        check.saved(tmp_path / str(step), RankFile(step, 3, 2))
    check.look_again()
    assert lines(caplog) == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_shared_folder_is_not_spoken_of(late: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check = SharedFolderCheck()
    saved(tmp_path, 2)
    if late:
        check.saved(tmp_path, LAST)
    (tmp_path / RankFile(5, 3, 0).partial).mkdir()  # rank 0 is writing
    if not late:
        check.saved(tmp_path, LAST)
    check.look_again()
    assert lines(caplog) == 0


def test_a_save_that_was_removed_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check = SharedFolderCheck()
    check.saved(tmp_path / "gone", LAST)
    check.look_again()
    assert lines(caplog) == 0


@pytest.mark.parametrize("rank_file", [RankFile(5, 3, 0), RankFile(5, 3, 1), RankFile(5, 1, 0)])
def test_the_last_rank_alone_speaks(rank_file: RankFile, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check = SharedFolderCheck()
    check.saved(tmp_path, rank_file)
    (tmp_path / rank_file.name).touch()
    check.look_again()
    assert lines(caplog) == 0


def save_once(root: Path, shared: bool) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    shared_folder.LOG.addHandler(handler)
    shared_folder.LOG.setLevel(logging.INFO)
    section = {"buffer": {"capacity": 50}, "ratio": 0.25, "exchange": {"timeout_s": 20}}
    with Rehearsal(section) as rehearsal:
        for step in range(3):
            rehearsal.update(new_batch(dist.get_rank(), step, 8))
        rehearsal.save(root if shared else root / str(dist.get_rank()))
    return [record for record in records if MESSAGE in record]


@pytest.mark.parametrize("shared", [True, False])
def test_real_ranks_say_it_of_their_disks_only(shared: bool, tmp_path: Path) -> None:
    first, last = run_ranks(save_once, 2, tmp_path, shared)
    assert first == []
    assert len(last) == (0 if shared else 1)
