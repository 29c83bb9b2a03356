"""Starts a module on several ranks of this machine under the DeepSpeed launcher."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from scripts.common.paths import ROOT

__all__ = ["free_port", "is_rank", "launch"]


def is_rank() -> bool:
    """Whether this process is one of the ranks that a launcher started."""
    return "RANK" in os.environ


def launch(module: str, ranks: int, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> int:
    """Runs `deepspeed --num_gpus <ranks> --module <module> <arguments>` and returns its exit status.

    The ranks run on the CPU with one thread each unless `DS_ACCELERATOR` or `OMP_NUM_THREADS` say otherwise; the
    launcher sets neither, and without them the ranks would fight for the same cores. What this process was started
    with goes before `environment`.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--no_local_rank"]
    command += ["--num_gpus", str(ranks), "--master_port", str(free_port()), "--module", module, *arguments]
    defaults = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = defaults | dict(environment or {}) | os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, env=variables, check=False).returncode


def free_port() -> int:
    """A port that nobody listens on, and that no connection is given meanwhile: Linux takes theirs from 32768 on."""
    while True:
        port = random.SystemRandom().randrange(15000, 32768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
