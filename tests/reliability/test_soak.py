"""Endurance: thousands of steps on two ranks, after which nothing has grown and nothing is lost.

`REHEARSAL_SOAK_STEPS` says how many; a thousand when it is not set.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import intact, new_batch, samples

pytestmark = pytest.mark.soak

STEPS = int(os.environ.get("REHEARSAL_SOAK_STEPS", "1000"))
WINDOWS, SIZE, CAPACITY = 20, 8, 250
SECTION: dict[str, Any] = {
    "buffer": {"capacity": CAPACITY, "partition_by": "label", "policy": "balanced"},
    "sampling": {"weights": "balanced"},
    "strategy": {"name": "x-der"},
    "ratio": 0.3,
    "exchange": {"timeout_s": 30},
    "checkpoint": {"asynchronous": True, "incremental": True},
}
PAGE, MIB = resource.getpagesize(), 1 << 20
OF_ONE_SIZE = 13
"""Objects that safetensors leaves behind for each size of a tensor that it has written: ctypes keeps a type of it."""


def held() -> dict[str, int]:
    """Memory, threads, files and objects of this process."""
    gc.collect()
    process, objects = Path("/proc/self"), gc.get_objects()
    sizes = sum(type(one) is type(ctypes.c_ubyte * 1) for one in objects)
    return {
        "bytes": int((process / "statm").read_text().split()[1]) * PAGE,
        "threads": len(list((process / "task").iterdir())),
        "files": len(list((process / "fd").iterdir())),
        "objects": len(objects) - OF_ONE_SIZE * sizes,
    }


def soak(folder: Path, steps: int) -> dict[str, Any]:
    """Train, save in the middle of every window, and look at what is held at its end."""
    rank, windows, whole = dist.get_rank(), [], True
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Rehearsal(SECTION) as rehearsal:
        for step in range(steps):
            new = new_batch(rank, step % 10_000, SIZE)
            batch = rehearsal.augment(new)
            whole &= intact(batch)
            outputs = model((batch["x"] % 97).float() / 97)
            torch.autograd.backward(rehearsal.loss(cross_entropy, outputs, batch["label"]))
            optimizer.step()
            optimizer.zero_grad()
            rehearsal.step()
            left = (steps - step - 1) % (steps // WINDOWS)
            if left == steps // WINDOWS // 2:
                rehearsal.save(folder)  # while training goes on
            if left == 0:
                rehearsal.flush()  # a file that is still being written would count as one that is held
                windows.append(held())
        rehearsal.drain()
        buffer = rehearsal.buffer
        assert buffer is not None
        rows = buffer.sample(CAPACITY)
        right = samples(rows["id"])
        sound = torch.stack([(rows[n] == right[n]).reshape(len(rows["id"]), -1).all(1) for n in right]).all(0)
        return {
            "windows": windows,
            "intact": whole,
            "step": rehearsal.steps,
            "digest": rehearsal._coordinator.digest,
            "rows": len(rows["id"]),
            "lost": CAPACITY - len(set(rows["id"][sound].tolist())),
            "metrics": rehearsal.metrics(),
        }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("soak")
    return run_ranks(soak, 2, folder, STEPS, timeout_s=60 + 0.05 * STEPS)


timeout = pytest.mark.timeout(120 + 0.05 * STEPS)


@timeout
def test_memory_threads_and_files_are_flat(ranks: list[dict[str, Any]], record_property: Any) -> None:
    record_property("steps_soaked", STEPS)
    for rank in ranks:
        warm, late = rank["windows"][WINDOWS // 5 : WINDOWS // 2], rank["windows"][-WINDOWS // 4 :]
        assert max(one["threads"] for one in late) == max(one["threads"] for one in warm)
        assert max(one["files"] for one in late) == max(one["files"] for one in warm)
        # Medians: a job that is under way when they are counted has some hundred objects of its own.
        assert median(one["objects"] for one in late) - median(one["objects"] for one in warm) < 200
        grown = max(one["bytes"] for one in late) - max(one["bytes"] for one in warm)
        record_property("bytes_grown", grown)
        assert grown < 8 * MIB


@timeout
def test_ranks_do_not_drift_apart(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["step"] == second["step"] == STEPS
    assert first["digest"] == second["digest"]
    totals = [rank["metrics"] for rank in ranks]
    assert sum(one["rows_sent"] for one in totals) == sum(one["rows_received"] for one in totals) > STEPS
    assert totals[0]["rows_replayed"] == totals[1]["rows_replayed"]


@timeout
def test_no_row_is_lost_or_torn(ranks: list[dict[str, Any]], record_property: Any) -> None:
    record_property("rows_lost", sum(rank["lost"] for rank in ranks))
    for rank in ranks:
        assert rank["intact"]
        assert rank["lost"] == 0
        assert rank["metrics"]["rows_offered"] == STEPS * SIZE
        assert rank["metrics"]["rows_stored"] == CAPACITY
        assert {rank["metrics"][f"rows_stored/{label}"] for label in range(5)} == {CAPACITY / 5}
