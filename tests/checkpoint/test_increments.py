"""Saves of what changed: what is written, what is linked, what stays whole whatever becomes of the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.checkpoint import format as files
from rehearsal_plugin.checkpoint import increments, saver
from rehearsal_plugin.checkpoint.format import Content
from rehearsal_plugin.checkpoint.timeline import find_newest
from rehearsal_plugin.checkpoint.tools import inspect, reshard
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import CheckpointError
from tests.checkpoint.test_checkpoint import VARIANTS, Job, alike, content
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import new_batch

SAVES = [3, 6, 7, 14, 24]
INCREMENTAL: dict[str, Any] = {"checkpoint": {"incremental": True}}


def parts(folder: Path) -> dict[str, int]:
    """The files of rows in a folder, and their inodes."""
    return {path.name: path.stat().st_ino for path in folder.glob("*.rows.safetensors")}


def rows_in(folder: Path) -> list[int]:
    """Rows in each of the newest checkpoint's files, oldest first."""
    found = find_newest(folder)
    assert found is not None
    return [rows for _, _, rows in files.read_header(folder, found[0])["parts"]]


# --- the same as a whole save ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("variant", ["er", "loss", "topk", "x-der", "balanced", "fifo", "micro-batches", "mmap"])
def test_every_save_holds_what_a_whole_one_holds(variant: str, background: bool, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"incremental": True, "asynchronous": background}, {}]
    jobs = [Job(**VARIANTS[variant], checkpoint=one) for one in settings]
    before = 0
    for step in SAVES:
        for job, name in zip(jobs, ("parts", "whole"), strict=True):
            job.train(before, step)
            job.rehearsal.save(tmp_path / name / str(step))
        before = step
    for job in jobs:
        job.rehearsal.close()
    for step in SAVES:
        assert alike(content(tmp_path / "parts" / str(step)), content(tmp_path / "whole" / str(step)))


def on_ranks(folder: Path) -> list[list[int]]:
    """Two saves, a load of the first by other jobs, and what each save wrote."""
    job = Job(**INCREMENTAL, buffer={"capacity": 200})
    job.train(0, 12)
    job.rehearsal.save(folder / "1")
    job.train(12, 14)
    job.rehearsal.save(folder / "2")
    dist.barrier()
    kept = {int(id) for id in _ids(job.rehearsal)}
    again = job.resumed(folder / "2", **INCREMENTAL, buffer={"capacity": 200})
    assert {int(id) for id in _ids(again.rehearsal)} == kept
    job.rehearsal.close()
    again.rehearsal.close()
    return [rows_in(folder / name) for name in ("1", "2")]


def _ids(rehearsal: Rehearsal) -> Tensor:
    assert rehearsal.buffer is not None
    ids = rehearsal.buffer.sample(len(rehearsal.buffer))["id"]
    assert isinstance(ids, Tensor)
    return ids


def test_ranks_save_their_changes_and_load_them(tmp_path: Path) -> None:
    for first, second in run_ranks(on_ranks, 2, tmp_path):
        assert len(first) == 1
        assert second[0] == first[0]
        assert 0 < second[1] < first[0]


# --- what is written -------------------------------------------------------------------------------------------------


def filled(steps: int = 10, capacity: int = 200) -> Job:
    job = Job(**INCREMENTAL, buffer={"capacity": capacity})
    job.train(0, steps)
    return job


def test_a_later_save_writes_the_new_rows_only_and_links_the_others(tmp_path: Path) -> None:
    job = filled()
    stored = len(job.rehearsal.buffer or ())
    job.rehearsal.save(tmp_path / "1")
    job.train(10, 12)
    job.rehearsal.save(tmp_path / "2")
    added = len(job.rehearsal.buffer or ()) - stored
    assert rows_in(tmp_path / "2") == [stored, added]
    first, second = parts(tmp_path / "1"), parts(tmp_path / "2")
    assert first.items() <= second.items(), "the same file under the same name"
    assert len(second) == 2


def test_a_save_without_a_change_writes_no_row(tmp_path: Path) -> None:
    job = filled()
    for name in "12":
        job.rehearsal.save(tmp_path / name)
    assert rows_in(tmp_path / "2")[1:] == [0]


def test_rows_that_were_rewritten_in_place_are_changes(tmp_path: Path) -> None:
    job = filled()
    job.rehearsal.save(tmp_path)
    buffer = job.rehearsal.buffer
    assert buffer is not None
    buffer.update_fields(torch.tensor([4, 7]).numpy(), {"half": torch.zeros(2, 2, dtype=torch.bfloat16)[:, 0]})
    job.rehearsal.save(tmp_path / "next")
    assert rows_in(tmp_path / "next")[1:] == [2]


def test_when_as_much_has_changed_as_there_is_all_rows_are_written_anew(tmp_path: Path) -> None:
    job = filled(capacity=40)
    written = []
    for step in range(10, 60, 2):
        job.rehearsal.save(tmp_path)
        job.train(step, step + 2)
        written.append(rows_in(tmp_path))
    assert all(sum(rows[1:]) < 40 for rows in written)
    assert sum(len(rows) == 1 for rows in written) > 1, "more than once"


def test_no_checkpoint_is_in_more_files_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(increments, "MOST_PARTS", 3)
    job, counts = filled(), []
    for _ in range(7):
        job.rehearsal.save(tmp_path)
        counts.append(len(rows_in(tmp_path)))
    assert counts == [1, 2, 3, 1, 2, 3, 1]


def test_files_that_no_checkpoint_needs_are_removed(tmp_path: Path) -> None:
    job = filled(capacity=40)
    for step in range(10, 60, 2):
        job.rehearsal.save(tmp_path)
        job.train(step, step + 2)
        needed = set()
        for place in files.list_files(tmp_path):
            needed |= {
                part.name for part in increments._parse_parts(files.read_header(tmp_path, place)["parts"], place)
            }
        assert parts(tmp_path).keys() == needed
    assert len(files.list_files(tmp_path)) == saver.KEPT


def test_only_its_owner_reads_the_files(tmp_path: Path) -> None:
    filled().rehearsal.save(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


# --- whatever becomes of the rest ------------------------------------------------------------------------------------


def loads(folder: Path, rows: int) -> bool:
    with Rehearsal({"buffer": {"capacity": 200}}, LocalTransport()) as other:
        other.load(folder)
        return len(other.buffer or ()) == rows


def test_a_folder_is_whole_when_the_earlier_ones_are_gone(tmp_path: Path) -> None:
    job = filled()
    job.rehearsal.save(tmp_path / "1")
    job.train(10, 12)
    job.rehearsal.save(tmp_path / "2")
    shutil.rmtree(tmp_path / "1")
    assert loads(tmp_path / "2", len(job.rehearsal.buffer or ()))


def forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder)


def unlinkable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("obstacle", [forgotten, unlinkable])
def test_what_cannot_be_linked_is_written_anew(
    obstacle: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = filled()
    job.rehearsal.save(tmp_path / "1")
    obstacle(tmp_path / "1", monkeypatch)
    job.train(10, 12)
    job.rehearsal.save(tmp_path / "2")
    stored = len(job.rehearsal.buffer or ())
    assert rows_in(tmp_path / "2") == [stored]
    assert loads(tmp_path / "2", stored)


def save_to_the_end(job: Job, folder: Path) -> None:
    """The next call tells what became of a save in the background."""
    job.rehearsal.save(folder)
    job.rehearsal.save(folder)


@pytest.mark.parametrize("background", [False, True])
def test_after_a_save_that_failed_all_rows_are_written(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(checkpoint={"incremental": True, "asynchronous": background}, buffer={"capacity": 200})
    job.train(0, 10)
    job.rehearsal.save(tmp_path / "1")

    def full(*_: object) -> None:
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(increments, "write_file", full)
        job.train(10, 12)
        with pytest.raises(CheckpointError, match="full"):
            save_to_the_end(job, tmp_path / "2")
    job.rehearsal.save(tmp_path / "3")
    job.rehearsal.close()
    assert rows_in(tmp_path / "3") == [len(job.rehearsal.buffer or ())]


def test_a_buffer_that_was_rolled_back_is_saved_as_it_is(tmp_path: Path) -> None:
    section: dict[str, Any] = {"buffer": {"capacity": 200}, **INCREMENTAL}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        for step in range(5):
            rehearsal.update(new_batch(0, step, 8))
        rehearsal.commit()
        before = sorted(_ids(rehearsal).tolist())
        for step in range(5, 9):
            rehearsal.update(new_batch(0, step, 8))
        rehearsal.save(tmp_path / "1")
        rehearsal.rollback()
        rehearsal.save(tmp_path / "2")
    with Rehearsal(section, LocalTransport()) as other:
        other.load(tmp_path / "2")
        assert sorted(_ids(other).tolist()) == before


def test_commands_read_it_like_any_other(tmp_path: Path) -> None:
    job = filled()
    job.rehearsal.save(tmp_path / "1")
    job.train(10, 12)
    job.rehearsal.save(tmp_path / "2")
    stored = len(job.rehearsal.buffer or ())
    assert inspect(tmp_path / "2")["rows"] == stored
    reshard([tmp_path / "2"], tmp_path / "out", 3)
    assert inspect(tmp_path / "out")["rows"] == stored


# --- files that are missing or forged --------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    job = filled()
    job.rehearsal.save(tmp_path)
    job.train(10, 12)
    job.rehearsal.save(tmp_path)
    job.rehearsal.close()
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        loads(folder, 0)
    return str(caught.value)


def test_a_file_of_rows_that_is_missing_is_named(saved: Path) -> None:
    name = min(parts(saved))
    (saved / name).unlink()
    assert name in refused(saved)


def test_a_file_of_rows_that_was_changed_is_named(saved: Path) -> None:
    name = max(parts(saved))
    data = bytearray((saved / name).read_bytes())
    data[-1] ^= 1
    (saved / name).write_bytes(data)
    assert name in refused(saved)


def test_a_file_of_rows_under_anothers_name_is_refused(saved: Path) -> None:
    first, second = sorted(parts(saved))
    shutil.copy(saved / first, saved / second)
    assert "contradicts itself" in refused(saved)


def forge(folder: Path, meta: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what the newest checkpoint says, with a right checksum."""
    found = find_newest(folder)
    assert found is not None
    head = files.read_file(folder, found[0])
    files.write_file(folder, found[0], Content(meta(head.meta), head.tensors))


@pytest.mark.parametrize(
    "listed",
    [
        [],
        None,
        7,
        [[1, "../../../etc/passwd", 3]],
        [[1, "0" * 16, 3]],
        [[-1, "0" * 16, 3]],
        [[1, 5, 3]],
        [[1, "0" * 16, "many"]],
        [[1]],
    ],
)
def test_a_list_of_files_that_is_none_is_refused(listed: Any, saved: Path) -> None:
    forge(saved, lambda meta: {**meta, "parts": listed})
    refused(saved)


@pytest.mark.parametrize("count", [-1, 10**15, "many", None, 7])
def test_a_number_of_rows_that_is_not_theirs_is_refused(count: Any, saved: Path) -> None:
    forge(saved, lambda meta: {**meta, "count": count})
    refused(saved)


@pytest.mark.parametrize("slots", [[-1], [10**15], [0.5], [[0]], [0, 0]], ids=str)
def test_rows_at_impossible_places_are_refused(slots: Any, saved: Path) -> None:
    found = find_newest(saved)
    assert found is not None
    listed = increments._parse_parts(files.read_header(saved, found[0])["parts"], found[0])
    part = listed[0]
    old = files.read_file(saved, part)
    places = old.tensors["slots"].clone()
    forged = torch.tensor(slots)
    if forged.is_floating_point() or forged.ndim > 1:
        places = places.to(forged.dtype).reshape(-1, *forged.shape[1:])
    places[: len(forged)] = forged
    files.write_file(saved, part, Content(old.meta, {**old.tensors, "slots": places}))
    refused(saved)
