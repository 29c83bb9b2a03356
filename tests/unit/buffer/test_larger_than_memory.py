"""A file-backed buffer that has more rows than the process may have memory: it is used, saved and loaded."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from tests.helpers.ranks import run_ranks

ROW_BYTES, BATCH = 64 << 10, 32
ROWS = (256 << 20) // ROW_BYTES
"""Rows of the buffer, 256 MiB."""

SLACK = 96 << 20
"""What a job may take beside what it has when it is warm; the worker, a step's rows and pieces of a copy are in it."""


def job(folder: Path, **keys: Any) -> Rehearsal:
    buffer = {"capacity": ROWS, "storage": "mmap", "path": str(folder / "rows"), **keys}
    return Rehearsal({"buffer": buffer, "representatives": 4}, LocalTransport())


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(BATCH) + BATCH * step
    return {"x": ids[:, None].repeat(1, ROW_BYTES // 8 - 2), "id": ids}


def steps(rehearsal: Rehearsal, numbers: range) -> set[int]:
    """Train; the rows that were replayed, each of which is whole."""
    seen = set()
    for number in numbers:
        given = rehearsal.update(batch(number))
        assert bool((given["x"] == given["id"][:, None]).all())
        seen |= set(given["id"][BATCH:].tolist())
    return seen


def data_bytes() -> int:
    """Private writable memory of this process, which is what the limit is on."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmData:")]
    return int(line.split()[1]) << 10


def limited(action: Callable[[Path], None], folder: Path, more: int) -> bool:
    """In a process of its own: do it with a limit on its memory; whether the limit bites."""
    with job(folder / "warm", capacity=8) as rehearsal:  # threads and libraries are there
        steps(rehearsal, range(4))
        rehearsal.save(folder / "warm-saved")
        rehearsal.load(folder / "warm-saved")
    limit = data_bytes() + SLACK + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    action(folder)
    try:
        np.ones(ROWS * ROW_BYTES + more, dtype=np.uint8)
    except MemoryError:
        return True
    return False


def fill_and_save(folder: Path) -> None:
    with job(folder) as rehearsal:
        steps(rehearsal, range(ROWS // BATCH + 4))
        assert rehearsal.buffer is not None
        assert len(rehearsal.buffer) == ROWS
        assert len(steps(rehearsal, range(1000, 1010))) > 30
        rehearsal.save(folder / "saved")
        steps(rehearsal, range(1010, 1014))


def go_on(folder: Path) -> None:
    with job(folder) as rehearsal:
        assert rehearsal.load(folder / "saved")
        assert len(steps(rehearsal, range(1010, 1020))) > 30


def take_over(folder: Path) -> None:
    with job(folder, deduplicate=True, capacity=ROWS + 5) as rehearsal:
        rehearsal.load(folder / "saved")
        assert rehearsal.buffer is not None
        assert len(rehearsal.buffer) == ROWS
        assert len(steps(rehearsal, range(1010, 1020))) > 30


def begin(folder: Path) -> None:
    with job(folder, preload=str(folder / "saved")) as rehearsal:
        assert len(steps(rehearsal, range(1010, 1020))) > 30
        assert rehearsal.buffer is not None
        assert len(rehearsal.buffer) == ROWS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large")
    assert run_ranks(limited, 1, fill_and_save, folder, 0) == [True]
    yield folder
    shutil.rmtree(folder)


def test_a_job_fills_replays_and_saves_more_rows_than_its_memory_holds(saved: Path) -> None:
    (file,) = (saved / "saved").iterdir()
    assert file.stat().st_size > ROWS * ROW_BYTES


@pytest.mark.parametrize("action", [go_on, take_over, begin])
def test_it_begins_with_them_too(action: Callable[[Path], None], saved: Path) -> None:
    mapped = ROWS * ROW_BYTES + (1 << 20)  # the file that is read is mapped, which counts, though it takes no memory
    assert run_ranks(limited, 1, action, saved, mapped) == [True]
