"""Modules run as a user runs them, `python -m <module>`, and the reports that scripts leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

__all__ = ["read_report", "run_module"]


def run_module(module: str, *arguments: object, cwd: Path = ROOT, timeout_s: float = 120) -> str:
    """Run `python -m <module> <arguments>`; what it printed, on both streams.

    A run that fails, or that is not over in time, fails the test; the ranks that it started are gone then, too.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed
    return printed


def read_report(folder: Path) -> dict[str, Any]:
    """The `report.json` in a folder."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report
