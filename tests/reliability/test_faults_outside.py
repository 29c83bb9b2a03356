"""Faults from outside: bytes of strangers on the ports of the ranks, and a scheduler's SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rehearsal_plugin import Rehearsal
from scripts.common.launch import free_port
from tests.helpers.faults import SIZE, WANTED, section, train
from tests.helpers.paths import ROOT
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, new_batch, rank_of

pytestmark = pytest.mark.fault

Record = Callable[[str, object], None]

# --- bytes of strangers ----------------------------------------------------------------------------------------------

STEPS, FIRST, SECOND = 400, 20, 40  # when the strangers come


def endure(launch: str) -> dict[str, Any]:
    """While the ranks exchange, a process outside the group sends noise to every port that they listen on."""
    rank, strangers = dist.get_rank(), []
    processes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(processes, torch.tensor([os.getpid()]))
    command = [sys.executable, "-m", "tests.helpers.jobs.stranger", *(str(int(process)) for process in processes)]

    def make(rank: int, step: int, size: int) -> Batch:
        if rank == 0 and step in (FIRST, SECOND):
            strangers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        if rank == 0 and step in (FIRST, STEPS - 1):
            strangers[-1].wait(30)  # at the first visit rank 1 waits in an exchange meanwhile, at the second both go on
        return new_batch(rank, step, size)

    rehearsal = Rehearsal(section(buffer={"capacity": STEPS * SIZE}, exchange={"launch": launch, "timeout_s": 20}))
    outcome = train(rehearsal, rank, range(STEPS), make)
    return {**outcome, "visits": [[int(n) for n in one.communicate(timeout=30)[0].split()] for one in strangers]}


@pytest.mark.parametrize("launch", ["thread", "inline"])
def test_noise_on_the_ports_of_the_ranks_reaches_no_row(launch: str, record_property: Record) -> None:
    ranks = run_ranks(endure, 2, launch, timeout_s=60)
    lost = [row for outcome in ranks for row in outcome["lost"]]
    record_property("rows_lost", len(lost))
    assert lost == []
    for ports, connections in ranks[0]["visits"]:
        assert ports >= 4, "each rank has some of its own"
        assert connections == 12 * ports, "all took what was sent"
    for outcome in ranks:
        assert outcome["error"] == ""
        assert outcome["intact"]
        assert [len(ids) for ids in outcome["ids"][2:]] == [SIZE + WANTED] * (STEPS - 2)
        assert {rank_of(row) for ids in outcome["ids"] for row in ids} == {0, 1}


# --- a scheduler's SIGTERM -------------------------------------------------------------------------------------------

START = """
import sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from rehearsal_plugin import Rehearsal

rank, port, launch, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
config = {"buffer": {"capacity": 50}, "ratio": 0.25, "exchange": {"launch": launch, "timeout_s": 300}}

def waits():
    frame, names = sys._current_frames()[threading.main_thread().ident], []
    while frame is not None:
        frame, _ = frame.f_back, names.append(frame.f_code.co_name)
    return "collect" in names

def tell():
    while not waits():
        time.sleep(0.01)
    (folder / "0").touch()

def loop(rehearsal):
    for step in range(10**9):
        rehearsal.update({"x": torch.full((8, 2), float(step))})
        if step == 6 and rank == 0:
            threading.Thread(target=tell, daemon=True).start()  # the next update waits for the other
        if step == 5 and rank == 1:
            (folder / "1").touch()
            while True:  # a step that takes for ever
                torch.mm(torch.ones(64, 64), torch.ones(64, 64))
"""

ENDS = {
    "thread": "with Rehearsal(config) as rehearsal:\n    loop(rehearsal)\n",
    "inline": "rehearsal = Rehearsal(config)\ntry:\n    loop(rehearsal)\nfinally:\n    rehearsal.close()\n",
}


def test_ranks_that_wait_for_a_slow_one_leave_at_sigterm_all_together(tmp_path: Path) -> None:
    jobs = [start(tmp_path / launch, launch) for launch in ENDS]
    processes = [process for job in jobs for process in job]
    try:
        for launch, job in zip(ENDS, jobs, strict=True):
            wait_for([tmp_path / launch / str(rank) for rank in range(2)], job)
        for process in processes:
            process.terminate()
        complaints = [process.communicate(timeout=30)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 4, complaints
    assert not any("Traceback" in complaint or "terminate called" in complaint for complaint in complaints)


def start(folder: Path, launch: str) -> list[subprocess.Popen[str]]:
    """Two ranks of a script that leaves its loop in one way or the other."""
    folder.mkdir()
    script = folder / "loop.py"
    script.write_text(START + ENDS[launch])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rehearsal_plugin.run", str(script)]
    port = str(free_port())
    return [
        subprocess.Popen(
            [*command, str(rank), port, launch, str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for(signs: list[Path], processes: list[subprocess.Popen[str]]) -> None:
    """Until all ranks are where they shall be."""
    deadline = time.monotonic() + 60
    while not all(sign.exists() for sign in signs):
        assert all(process.poll() is None for process in processes), "the script ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
