"""Exit codes and standard error of ranks that come to the end of a script.

Ranks of `tests.helpers.ranks` leave by `os._exit`, as workers do. Here a process that has the slow imports behind it
forks the ranks, and each of them falls off the end of the program: exit handlers, interpreter, C++ statics.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scripts.common.launch import free_port

__all__ = ["run_exits"]

DEADLINE_S = 40.0


def run_exits(scenarios: Iterable[Callable[[int], Any]], size: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Run `scenario(rank)` on `size` ranks with gloo initialised, one scenario after the other.

    Returns:
        By name of the scenario, for every rank: `code`, `stderr`, and `seconds` that it lived.
    """
    scenarios = list(scenarios)
    names = [scenario.__name__ for scenario in scenarios]
    command = [sys.executable, "-m", "tests.helpers.exits", str(size), scenarios[0].__module__, *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return results


def main(size: int, module: str, names: list[str]) -> None:
    scenarios = importlib.import_module(module)
    results = {}
    for name in names:
        port, folder, start = free_port(), Path(tempfile.mkdtemp()), time.monotonic()
        children: list[int] = []
        for rank in range(size):
            child = os.fork()
            if not child:
                return _be_rank(getattr(scenarios, name), rank, size, port, folder)
            children.append(child)
        codes = _wait(children, start + DEADLINE_S)
        results[name] = [
            {"code": code, "seconds": end - start, "stderr": (folder / str(rank)).read_text()}
            for rank, (code, end) in enumerate(codes)
        ]
    print(json.dumps(results), flush=True)
    return None


def _be_rank(scenario: Callable[[int], Any], rank: int, size: int, port: int, folder: Path) -> None:
    with (folder / str(rank)).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    scenario(rank)


def _wait(children: list[int], deadline: float) -> list[tuple[int, float]]:
    """Exit code and time of the end of every child; minus a signal's number where one ended it."""
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < len(children):
        for child in set(children) - ended.keys():
            if time.monotonic() > deadline:
                os.kill(child, 9)
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                ended[child] = os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.02)
    return [ended[child] for child in children]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
