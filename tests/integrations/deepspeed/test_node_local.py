"""DeepSpeed with `use_node_local_storage`: every host has a disk of its own, and `latest` lies on the first alone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rehearsal_plugin.errors import CheckpointError
from tests.helpers.ranks import run_ranks
from tests.helpers.witness import config_of, engine_of, train

pytest.importorskip("deepspeed")

BLOCK: dict[str, Any] = {"buffer": {"capacity": 50}, "representatives": 2, "exchange": {"timeout_s": 30}}


def config(stage: int) -> Mapping[str, Any]:
    return {
        **config_of(BLOCK),
        "zero_optimization": {"stage": stage},
        "checkpoint": {"use_node_local_storage": True},
    }


def save_and_resume(root: Path, stage: int) -> dict[str, Any]:
    """What a job of one rank a host sees after its save, resumed without a tag and with one."""
    os.environ["LOCAL_RANK"] = "0"  # one rank a host
    disk, missing = root / f"disk{dist.get_rank()}", root / f"disk{dist.get_rank()}" / "missing"
    engine = engine_of(config(stage))
    train(engine, 6)
    engine.save_checkpoint(str(disk))
    expected, seen = train(engine, 6, first=6), {}
    engine.destroy()
    latest = (disk / "latest").exists()
    for name, tag in (("no tag", None), ("tag", "global_step6")):
        engine = engine_of(config(stage))
        assert engine.load_checkpoint(str(disk), tag=tag)[0] is not None
        seen[name] = engine.rehearsal.rehearsal.steps == 6 and train(engine, 6, first=6) == expected
        engine.destroy()
    engine = engine_of(config(stage))
    seen["none"] = engine.load_checkpoint(str(missing)) == (None, None)
    engine.destroy()
    return {"latest": latest, **seen}


@pytest.mark.parametrize("stage", [0, 1])
def test_a_job_goes_on_bit_for_bit_from_the_disks_of_its_hosts(stage: int, tmp_path: Path) -> None:
    rest = {"no tag": True, "tag": True, "none": True}
    assert run_ranks(save_and_resume, 2, tmp_path, stage) == [{"latest": True, **rest}, {"latest": False, **rest}]


def load_what_one_lost(root: Path) -> list[tuple[str, bool]]:
    """What a rank is told, and if at once, where host 2 lost the folder of the tag or has another `latest`."""
    os.environ["LOCAL_RANK"] = "0"
    rank, told = dist.get_rank(), []
    disk = root / f"disk{rank}"
    engine = engine_of(config(1))
    train(engine, 3)
    engine.save_checkpoint(str(disk))
    if rank == 1:
        shutil.move(disk / "global_step3", disk / "away")
    for latest in (None, "global_step2"):
        if rank == 1 and latest is not None:
            (disk / "latest").write_text(latest)
        dist.barrier()
        begin = time.monotonic()
        try:
            engine.load_checkpoint(str(disk))
        except CheckpointError as error:
            told.append((str(error), time.monotonic() - begin < 10))
    engine.destroy()
    return told


def test_ranks_that_find_nothing_make_all_of_them_say_so_at_once(tmp_path: Path) -> None:
    for told in run_ranks(load_what_one_lost, 2, tmp_path):
        (lost, at_once), (other, at_once_too) = told
        assert at_once
        assert at_once_too
        assert "rank 0: global_step3; rank 1: none" in lost
        assert "rank 0: global_step3; rank 1: global_step2" in other
