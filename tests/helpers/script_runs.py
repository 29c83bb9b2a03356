"""Modules run as a user runs them, `python -m <module>`, and the reports that scripts leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

__all__ = ["read_report", "run_command", "run_module"]


def run_module(module: str, *arguments: object, cwd: Path = ROOT, timeout_s: float = 120) -> str:
    """Run `python -m <module> <arguments>`; what it printed, on both streams.

    A run that fails, or that is not over in time, fails the test; the ranks that it started are gone then, too.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    status, printed = run_command([sys.executable, "-m", module, *map(str, arguments)], cwd, environment, timeout_s)
    assert status == 0, printed
    return printed


def run_command(command: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout_s: float) -> tuple[int, str]:
    """Run a command in a session of its own; its exit status, and what it printed, on both streams.

    A command that is not over in time fails the test; all processes that it started are gone then, too.
    """
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"not over in {timeout_s} s:\n{process.communicate()[0]}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, printed


def read_report(folder: Path) -> dict[str, Any]:
    """The `report.json` in a folder."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report
