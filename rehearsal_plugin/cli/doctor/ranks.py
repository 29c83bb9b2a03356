"""One tiny exchange between ranks: those of a launcher, or processes that are started for it.

`python -m rehearsal_plugin.cli.doctor.ranks BACKEND` is one of these processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rehearsal_plugin.cli.doctor.finding import Finding, fine, problem
from rehearsal_plugin.rehearsal import Rehearsal

__all__ = ["check_exchange", "exchange", "launched"]

TIMEOUT_S = 60
STEPS, ROWS, REPLAYED = 12, 4, 4
CURE = "see that the ranks reach each other on all ports, and name their network interface in {variable}"
INTERFACES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def check_exchange(ranks: int) -> Iterator[Finding]:
    """Try gloo, and NCCL where each rank has a GPU.

    Args:
        ranks: Processes to start, where no launcher has started them.
    """
    backends = ["gloo"]
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if launched() else ranks
    if gpus >= local:
        backends.append("nccl")
    else:
        yield fine("exchange", f"NCCL was not tried: {gpus} GPUs for {local} ranks of this machine")
    for backend in backends:
        outcome = _tried(backend, ranks)
        if "error" in outcome:
            yield problem("exchange", f"{backend}: {outcome['error']}", CURE.format(variable=INTERFACES[backend]))
        else:
            yield fine("exchange", "{backend}: {ranks} ranks exchanged rows, {ms:.3g} ms a step".format(**outcome))


def exchange(backend: str) -> dict[str, Any]:
    """Train nothing for some steps, and see rows of other ranks come; all ranks call this.

    Returns:
        `backend`, `ranks` and `ms` a step, or `error`.
    """
    try:
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
        return _exchange_rows(backend, torch.device("cuda" if backend == "nccl" else "cpu"))
    except Exception as error:  # whatever it is, it is what the doctor has to tell
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}


def _exchange_rows(backend: str, device: torch.device) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    section = {
        "buffer": {"capacity": 64},
        "representatives": REPLAYED,
        "exchange": {"backend": backend, "timeout_s": TIMEOUT_S},
    }
    batch, others = {"rank": torch.full((ROWS,), rank, device=device)}, 0
    with Rehearsal(section) as rehearsal:
        start = time.perf_counter()
        for _ in range(STEPS):
            others += int((rehearsal.update(batch)["rank"] != rank).sum())
        ms = 1e3 * (time.perf_counter() - start) / STEPS
    if not others:
        raise RuntimeError(f"rank {rank} of {ranks} got no row of another rank in {STEPS} steps")
    return {"backend": backend, "ranks": ranks, "ms": ms}


def _tried(backend: str, ranks: int) -> dict[str, Any]:
    """The outcome of an exchange, here or in processes of its own."""
    return exchange(backend) if launched() else _start_ranks(backend, ranks)


def _start_ranks(backend: str, ranks: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    package = str(Path(__file__).resolve().parents[3])  # also where it is on the path and not installed
    shared["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__, backend]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outcomes = [_outcome(process) for process in processes]
    return next((outcome for outcome in outcomes if "error" in outcome), outcomes[0])


def _outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        printed, complaint = process.communicate(timeout=3 * TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"no end within {3 * TIMEOUT_S} s"}
    lines = printed.strip().splitlines()
    if process.returncode or not lines:
        last = complaint.strip().rpartition("\n")[2]
        return {"error": f"a rank ended with status {process.returncode}: {last}"}
    outcome: dict[str, Any] = json.loads(lines[-1])
    return outcome


if __name__ == "__main__":
    print(json.dumps(exchange(sys.argv[1])))
    if dist.is_initialized():
        dist.destroy_process_group()
