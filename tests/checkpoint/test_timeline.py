"""Which checkpoint of a folder is loaded, and which ones a save removes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.checkpoint.format import RankFile, Stamp, read_file, write_file
from rehearsal_plugin.checkpoint.retention import outlived_files
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import CheckpointError
from tests.helpers.ranks import run_ranks

SECTION = {"buffer": {"capacity": 1000}, "representatives": 2, "exchange": {"timeout_s": 20}}


def job(**keys: Any) -> Rehearsal:
    return Rehearsal({**SECTION, **keys}, LocalTransport())


def train(rehearsal: Rehearsal, steps: int, value: float) -> None:
    for _ in range(steps):
        rehearsal.update({"x": torch.full((2,), value)})


def run_of(folder: Path, value: float, saves: int, every: int, **keys: Any) -> None:
    """A run from scratch that saves every so many steps."""
    with job(**keys) as rehearsal:
        for _ in range(saves):
            train(rehearsal, every, value)
            rehearsal.save(folder)


def steps_in(folder: Path) -> list[int]:
    names = (re.fullmatch(r"rehearsal-step(\d+)-rank0-of-\d+\.safetensors", path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


def loaded(folder: Path, **arguments: Any) -> tuple[int, set[float]]:
    """The step and the values of the rows of a job that loads from the folder."""
    with job() as rehearsal:
        rehearsal.load(folder, **arguments)
        assert rehearsal.buffer is not None
        return rehearsal.steps, set(rehearsal.buffer.sample(1000)["x"].tolist())


@pytest.mark.parametrize("checkpoint", [{}, {"incremental": True}, {"asynchronous": True, "incremental": True}])
def test_the_last_run_is_loaded_and_its_saves_stay(checkpoint: dict[str, bool], tmp_path: Path) -> None:
    run_of(tmp_path, 1, 3, 50, checkpoint=checkpoint)
    run_of(tmp_path, 2, 4, 5, checkpoint=checkpoint)
    assert steps_in(tmp_path) == [10, 15, 20, 50, 100, 150]
    assert loaded(tmp_path) == (20, {2.0})


def test_a_run_of_the_same_steps_is_written_over(tmp_path: Path) -> None:
    run_of(tmp_path, 1, 3, 10)
    run_of(tmp_path, 2, 1, 20)
    assert loaded(tmp_path) == (20, {2.0})


def test_a_step_and_a_run_name_one_checkpoint(tmp_path: Path) -> None:
    with job() as first:
        train(first, 5, 1)
        first.save(tmp_path)
        run = first.run
    run_of(tmp_path, 2, 2, 10)
    assert loaded(tmp_path, step=5, run=run) == (5, {1.0})
    with job() as rehearsal, pytest.raises(CheckpointError, match="rehearsal files of another run"):
        rehearsal.load(tmp_path, step=10, run=run)
    with job() as rehearsal, pytest.raises(CheckpointError, match="rehearsal files of another run"):
        rehearsal.load(tmp_path, step=7, run=run)


@pytest.mark.parametrize("named", [(), ("step",), ("run",), ("step", "run")])
def test_a_folder_whose_files_were_removed_has_none(tmp_path: Path, named: tuple[str, ...]) -> None:
    with job() as first:
        train(first, 5, 1)
        first.save(tmp_path)
        wanted: dict[str, Any] = {name: value for name, value in (("step", 5), ("run", first.run)) if name in named}
    for path in tmp_path.glob("rehearsal-*"):
        path.unlink()
    with job() as rehearsal:
        assert not rehearsal.load(tmp_path, **wanted, missing_ok=True)
        with pytest.raises(CheckpointError, match="has no rehearsal checkpoint"):
            rehearsal.load(tmp_path, **wanted)


def test_after_going_back_the_new_past_is_loaded_and_the_old_one_kept(tmp_path: Path) -> None:
    with job() as rehearsal:
        for _ in range(4):
            train(rehearsal, 10, 1)
            rehearsal.save(tmp_path)
        run = rehearsal.run
    with job() as rehearsal:
        rehearsal.load(tmp_path, step=20)
        train(rehearsal, 5, 2)
        rehearsal.save(tmp_path)
        assert rehearsal.run == run
    assert loaded(tmp_path)[0] == 25
    assert steps_in(tmp_path) == [20, 25, 30, 40]


def test_only_the_own_past_is_removed_by_age() -> None:
    stamps = {
        RankFile(step, 1, 0): Stamp(run, number)
        for step, run, number in [
            (10, "a", 3), (20, "a", 4), (30, "a", 5), (40, "a", 6), (25, "a", 7), (50, "b", 1), (60, None, 0),
        ]
    }  # fmt: skip
    gone = outlived_files(stamps, RankFile(27, 1, 0), "a", 3)
    assert [old.step for old in gone] == [30, 10]
    assert outlived_files(stamps, RankFile(27, 1, 0), None, 3) == []


def test_files_without_an_identifier_are_the_oldest_of_a_past() -> None:
    stamps = {RankFile(step, 1, 0): Stamp("a" if step > 20 else None, step // 30) for step in (10, 20, 30)}
    assert outlived_files(stamps, RankFile(40, 1, 0), "a", 3) == [RankFile(10, 1, 0)]


def test_a_run_keeps_its_identifier_over_restarts_and_others_have_another(tmp_path: Path) -> None:
    with job() as first, job() as second:
        assert first.run is None
        train(first, 2, 1)
        train(second, 2, 1)
        first.save(tmp_path)
        assert first.run != second.run
        second.load(tmp_path)
        assert second.run == first.run
        train(second, 2, 1)
        second.rollback()
        assert second.run == first.run
        run = first.run
    with job(buffer={"capacity": 2}) as other:
        other.load(tmp_path)
        train(other, 3, 1)
        other.save(tmp_path)
        assert other.run == run


def test_a_preload_begins_a_run_of_its_own(tmp_path: Path) -> None:
    with job() as first:
        train(first, 3, 1)
        first.save(tmp_path)
        run = first.run
    with job(buffer={"capacity": 50, "preload": str(tmp_path)}) as second:
        train(second, 3, 1)
        second.drain()
        assert second.run not in (None, run)


def test_files_without_an_identifier_load_by_their_step_and_stay(tmp_path: Path) -> None:
    run_of(tmp_path, 1, 3, 10)
    for step in (10, 20, 30):
        file = RankFile(step, 1, 0)
        content = read_file(tmp_path, file)
        write_file(tmp_path, file, replace(content, stamp=Stamp()))
    assert loaded(tmp_path)[0] == 30
    assert loaded(tmp_path, step=20, run="0" * 16)[0] == 20
    run_of(tmp_path, 2, 4, 2)
    assert steps_in(tmp_path) == [4, 6, 8, 10, 20, 30]
    assert loaded(tmp_path) == (8, {2.0})


def test_a_newest_file_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    run_of(tmp_path, 1, 2, 10)
    newest = tmp_path / RankFile(20, 1, 0).name
    newest.write_bytes(newest.read_bytes()[:100])
    with job() as rehearsal, pytest.raises(CheckpointError, match=f"{newest.name} cannot be read"):
        rehearsal.load(tmp_path)


# --- real ranks ------------------------------------------------------------------------------------------------------


def on_ranks(folder: Path) -> bytes:
    """Two runs, of which the second dies on rank 1 before its save; the second has another number of steps too."""
    runs = []
    for value, steps in ((1.0, 12), (2.0, 6)):
        with Rehearsal(SECTION) as rehearsal:
            train(rehearsal, steps, value)
            rehearsal.save(folder / "tag")
            runs.append(rehearsal.run)
            rehearsal.drain()
        dist.barrier()
    with Rehearsal(SECTION) as rehearsal:
        rehearsal.load(folder / "tag")
        assert rehearsal.steps == 6
        assert rehearsal.run == runs[1]
    with Rehearsal(SECTION) as rehearsal:
        train(rehearsal, 12, 3.0)
        if dist.get_rank() == 0:
            rehearsal.save(folder / "tag")  # over the file of the first run
        rehearsal.drain()
    dist.barrier()
    for section in (SECTION, {**SECTION, "buffer": {"capacity": 10}}):
        with Rehearsal(section) as rehearsal, pytest.raises(CheckpointError, match="by different runs"):
            rehearsal.load(folder / "tag", step=12)
    local = {**SECTION, "sampling": {"scope": "local"}}
    with Rehearsal(local) as rehearsal:
        train(rehearsal, 4, 1.0)
        rehearsal.save(folder / "local")
        rehearsal.drain()
        progress: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(progress, {"step": rehearsal.steps, "run": rehearsal.run})
    own = progress[dist.get_rank()]
    for named in ({}, progress[0], own):
        with Rehearsal(local) as rehearsal:
            assert rehearsal.load(folder / "local", **named)
            assert rehearsal.run == own["run"]
    return repr(runs).encode()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_on_the_run(size: int, tmp_path: Path) -> None:
    runs = run_ranks(on_ranks, size, tmp_path, timeout_s=120)
    assert len(set(runs)) == 1
    assert b"None" not in runs[0]
