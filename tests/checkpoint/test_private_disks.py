"""Ranks with a disk of their host each go on from what all disks hold together, bit for bit as from one folder."""

from __future__ import annotations

import os
import pickle
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.checkpoint.format import RankFile
from rehearsal_plugin.errors import CheckpointError
from tests.checkpoint.test_checkpoint import Job
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, new_batch, same

STOP, LAST = 12, 20
CLASSES = {"capacity": 40, "partition_by": "label"}
JOBS: dict[str, dict[str, Any]] = {
    "reservoir": {},
    "mixture": {"buffer": {**CLASSES, "policy": "balanced"}, "sampling": {"weights": "balanced"}},
    "incremental": {"checkpoint": {"incremental": True, "asynchronous": True}},
    "recorded": {"strategy": {"name": "der++"}, "ratio": 0.3, "micro": 2},
    "local": {"sampling": {"scope": "local"}},
}


def save_jobs(root: Path, disks: Sequence[int]) -> bytes:
    """Save every job into a folder of all ranks and onto this rank's disk; the batches that it sees afterwards."""
    seen = {}
    for name, keys in JOBS.items():
        job = Job(**keys)
        job.train(0, STOP - 3)
        job.rehearsal.save(disk_of(root, name, disks))
        job.rehearsal.save(root / name / "shared")
        job.train(STOP - 3, STOP)
        job.rehearsal.save(disk_of(root, name, disks))
        job.rehearsal.save(root / name / "shared")
        seen[name] = job.train(STOP, LAST)
        job.rehearsal.close()
    return pickle.dumps(seen)


def load_jobs(root: Path, disks: Sequence[int]) -> bytes:
    """The batches of every job after a load from the folder of all, and after one from the disks."""
    seen: dict[str, list[list[Batch]]] = {}
    for name, keys in JOBS.items():
        for folder in (root / name / "shared", disk_of(root, name, disks)):
            job = Job(**keys)
            before = files_below(folder.parent)
            dist.barrier()
            assert job.rehearsal.load(folder)
            assert job.rehearsal.steps == STOP
            seen.setdefault(name, []).append(job.train(STOP, LAST))
            job.rehearsal.close()
            dist.barrier()
            assert files_below(folder.parent) == before, "copies are gone"
    return pickle.dumps(seen)


def files_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def disk_of(root: Path, name: str, disks: Sequence[int]) -> Path:
    return root / name / f"disk{disks[dist.get_rank()]}"


def equal(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Mapping[str, list[Batch]]]]:
    """Checkpoints of four ranks on two hosts, and what the ranks saw afterwards."""
    root = tmp_path_factory.mktemp("four")
    return root, [pickle.loads(seen) for seen in run_ranks(save_jobs, 4, root, [0, 0, 1, 1])]


@pytest.mark.parametrize("disks", [[0, 0, 1, 1], [1, 0, 1, 0]], ids=["as before", "other hosts"])
def test_as_many_ranks_go_on_bit_for_bit(disks: list[int], of_four: Any) -> None:
    root, expected = of_four
    for rank, seen in enumerate(map(pickle.loads, run_ranks(load_jobs, 4, root, disks))):
        for name in JOBS:
            assert all(equal(expected[rank][name], batches) for batches in seen[name]), (rank, name)


@pytest.mark.parametrize("disks", [[0, 1], [0, 0, 1], [1, 2, 0]], ids=["fewer", "three", "a new host"])
def test_other_ranks_share_out_the_rows_as_from_one_folder(disks: list[int], of_four: Any) -> None:
    for seen in map(pickle.loads, run_ranks(load_jobs, len(disks), of_four[0], disks)):
        for name in JOBS:
            shared, private = seen[name]
            assert equal(shared, private), name
            assert any(len(batch["id"]) > 8 for batch in private)


def test_more_ranks_do_too(tmp_path: Path) -> None:
    run_ranks(save_jobs, 2, tmp_path, [0, 1])
    for seen in map(pickle.loads, run_ranks(load_jobs, 4, tmp_path, [0, 0, 1, 1])):
        for name in JOBS:
            assert equal(*seen[name]), name


# --- what is missing -------------------------------------------------------------------------------------------------

SECTION = {"buffer": {"capacity": 50}, "ratio": 0.25, "exchange": {"timeout_s": 20}}


def save_each(root: Path, steps: Sequence[int], disks: Sequence[int]) -> str | None:
    """Save at these steps onto this rank's disk; the run."""
    folder = root / f"disk{disks[dist.get_rank()]}"
    with Rehearsal(SECTION) as rehearsal:
        for step in range(max(steps)):
            rehearsal.update(new_batch(dist.get_rank(), step, 8))
            if step + 1 in steps:
                rehearsal.save(folder)
        return rehearsal.run


def try_to_load(root: Path, disks: Sequence[int], asked: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """What this rank is told, and after how many seconds."""
    rank = dist.get_rank()
    with Rehearsal(SECTION) as rehearsal:
        begin = time.monotonic()
        try:
            loaded = rehearsal.load(root / f"disk{disks[rank]}", **asked[rank % len(asked)])
            return f"{loaded} {rehearsal.steps}", time.monotonic() - begin
        except CheckpointError as error:
            return str(error), time.monotonic() - begin


def told(root: Path, size: int, *asked: Mapping[str, Any], disks: Sequence[int] = (0, 1, 2, 3)) -> str:
    """What all ranks are told alike, at once."""
    results = run_ranks(try_to_load, size, root, disks, asked or ({},))
    assert max(seconds for _, seconds in results) < 10
    messages: set[str] = {message for message, _ in results}
    assert len(messages) == 1
    return messages.pop()


def test_a_file_that_no_disk_has_is_named_with_who_has_the_others(tmp_path: Path) -> None:
    run_ranks(save_each, 2, tmp_path, [9], [0, 1])
    shutil.rmtree(tmp_path / "disk1")
    message = told(tmp_path, 2)
    assert "of step 9, 1 of 2 files are there, and rehearsal-step9-rank1-of-2.safetensors is missing" in message
    host = os.uname().nodename
    assert f"rank 0 on {host} ({tmp_path / 'disk0'}) has those of ranks 0; rank 1 on {host}" in message
    assert f"({tmp_path / 'disk1'}) has none" in message
    assert not (tmp_path / "disk1").exists()
    shutil.rmtree(tmp_path / "disk0")
    assert told(tmp_path, 2, {"missing_ok": True}) == "False 0"


def test_a_save_that_one_rank_did_not_finish_is_passed_over(tmp_path: Path) -> None:
    run_ranks(save_each, 2, tmp_path, [3, 6, 9], [0, 1])
    (tmp_path / "disk0" / RankFile(9, 2, 0).name).unlink()
    assert told(tmp_path, 2) == "True 6"
    assert "step 9, 1 of 2 files are there" in told(tmp_path, 2, {"step": 9})
    assert told(tmp_path, 2, {"step": 3}) == "True 3"


def test_ranks_that_ask_for_different_steps_are_told_so(tmp_path: Path) -> None:
    run_ranks(save_each, 2, tmp_path, [3, 6], [0, 1])
    assert "ask for different checkpoints (rank 0: step 3, rank 1: step 6)" in told(
        tmp_path, 2, {"step": 3}, {"step": 6}
    )


def test_files_of_two_runs_are_not_put_together(tmp_path: Path) -> None:
    first = run_ranks(save_each, 2, tmp_path / "first", [6], [0, 1])[0]
    run_ranks(save_each, 2, tmp_path / "second", [6], [0, 1])
    shutil.copytree(tmp_path / "first" / "disk0", tmp_path / "disk0")
    shutil.copytree(tmp_path / "second" / "disk1", tmp_path / "disk1")
    assert "were not saved together, but by different runs" in told(tmp_path, 2)
    shutil.copytree(tmp_path / "first" / "disk1", tmp_path / "disk2")
    assert told(tmp_path, 3, {"run": first, "step": 6}) == "True 6", "the files of one run are on the disks"
    assert "rehearsal files of another run" in told(tmp_path, 3, {"run": "0" * 16, "step": 6})


def damage(root: Path) -> None:
    path = root / "disk0" / RankFile(6, 2, 0).name
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("disks", [[0, 1], [1, 0]], ids=["own", "of the other host"])
def test_a_file_that_is_damaged_is_an_error_on_all_ranks(disks: list[int], tmp_path: Path) -> None:
    run_ranks(save_each, 2, tmp_path, [6], [0, 1])
    damage(tmp_path)
    messages = [message for message, _ in run_ranks(try_to_load, 2, tmp_path, disks, [{}])]
    assert sum("cannot load the checkpoint in" in message for message in messages) == 1
    assert sum("cannot be read" in message for message in messages) == 1


# --- keeping and numbers ---------------------------------------------------------------------------------------------


def reshard_and_save(root: Path, disks: Sequence[int]) -> list[str]:
    """Load, train and save several times on other ranks; the files on this rank's disk."""
    rank = dist.get_rank()
    folder = root / f"disk{disks[rank]}"
    with Rehearsal(SECTION) as rehearsal:
        rehearsal.load(folder)
        for step in range(6, 12):
            rehearsal.update(new_batch(rank, step, 8))
            rehearsal.save(folder)
    dist.barrier()
    return sorted(path.name for path in folder.iterdir())


def test_old_files_of_ranks_that_are_no_more_go_on_every_disk(tmp_path: Path) -> None:
    run_ranks(save_each, 4, tmp_path, [2, 4, 6], [0, 0, 1, 1])
    for rank, names in enumerate(run_ranks(reshard_and_save, 2, tmp_path, [0, 1])):
        assert names == sorted(RankFile(step, 2, rank).name for step in (10, 11, 12))


def go_back_and_save(root: Path, disks: Sequence[int]) -> None:
    """Go back to step 2 and save at step 3."""
    rank = dist.get_rank()
    with Rehearsal(SECTION) as rehearsal:
        rehearsal.load(root / f"disk{disks[rank]}", step=2)
        rehearsal.update(new_batch(rank, 2, 8))
        rehearsal.save(root / f"disk{disks[rank]}")


def test_a_save_after_a_load_is_the_newest_on_a_disk_without_files_too(tmp_path: Path) -> None:
    run_ranks(save_each, 2, tmp_path, [2, 4, 6], [0, 0])
    run_ranks(go_back_and_save, 2, tmp_path, [2, 0])
    assert told(tmp_path, 3) == "True 3"
