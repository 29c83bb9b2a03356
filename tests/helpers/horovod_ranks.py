"""Real Horovod jobs for tests: functions and scripts under `horovodrun`, with a deadline and nothing left behind."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

__all__ = ["ROOT", "Job", "horovodrun", "perform", "run_horovod"]

MARK = "REHEARSAL_TEST_JOB"  # in the environment of every process of a job


@dataclass(frozen=True)
class Job:
    """End of a job: exit status of `horovodrun`, what was printed, seconds, processes that it left running."""

    status: int
    printed: str
    seconds: float
    left: list[int]

    def succeeded(self) -> Job:
        assert self.status == 0, self.printed
        assert not self.left, f"processes {self.left} outlived the job"
        return self


def horovodrun(
    options: Sequence[str], *command: object, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Job:
    """Run `horovodrun <options> python <command>`; after `timeout_s` seconds all its processes are killed."""
    mark = uuid.uuid4().hex
    line = [sys.executable, "-m", "horovod.runner.launch", *options, "--gloo", sys.executable, *map(str, command)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", MARK: mark}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env={**variables, **(environment or {})}, cwd=ROOT)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = 124
        left = _end(mark) if status == 124 else _outlive(mark)
        process.wait()
        log.seek(0)
        return Job(status, log.read(), time.monotonic() - start, left)


def run_horovod(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 90.0, **more: Any) -> list[Any]:
    """`function(*args)` on `size` ranks of Horovod, initialised; the results by rank."""
    results, job = try_horovod(function, size, *args, timeout_s=timeout_s, **more)
    job.succeeded()
    return results


def try_horovod(
    function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 90.0, **more: Any
) -> tuple[list[Any], Job]:
    """As `run_horovod`, for jobs that may fail: None where a rank gave no result, and how the job ended."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((function.__module__, function.__name__, args)))
        job = horovodrun(["-np", str(size)], "-m", "tests.helpers.horovod_ranks", folder, timeout_s=timeout_s, **more)
        results = [Path(folder, str(rank)) for rank in range(size)]
        return [pickle.loads(path.read_bytes()) if path.exists() else None for path in results], job


def perform(scenarios: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """On a rank: run scenarios one after another, so that a launch is paid once."""
    return {name: scenario() for name, scenario in scenarios.items()}


def _outlive(mark: str) -> list[int]:
    """Processes of a job that has ended; they get two seconds to follow."""
    patience = time.monotonic() + 2
    while _alive(mark) and time.monotonic() < patience:
        time.sleep(0.05)
    return _end(mark)


def _end(mark: str) -> list[int]:
    """Kill all processes of a job; which they were."""
    alive = _alive(mark)
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return alive


def _alive(mark: str) -> list[int]:
    pids = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                pids.append(int(folder.name))
    return pids


def main(folder: Path) -> None:
    import horovod.torch as hvd
    import torch

    torch.set_num_threads(1)  # waiting ranks spin
    module, name, args = pickle.loads((folder / "call").read_bytes())
    hvd.init()
    try:
        result = getattr(importlib.import_module(module), name)(*args)
    except BaseException:
        traceback.print_exc()
        raise
    (folder / str(hvd.rank())).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
