"""One form of report for every script that measures: `out/<script>/report.json`, or where `--json` says.

    {"summary": {name: number}, "rows": [{...}, ...], "environment": {...}}

`summary` holds the few numbers that the script was run for, `rows` the table behind them, and `environment` what a
reader needs to run it again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts.common.paths import ROOT

__all__ = ["PEERS", "environment", "write_report", "write_text"]

STARTED = time.monotonic()
PEERS = ("torchrl", "tensordict", "cpprb")
PACKAGES = ("rehearsal-plugin", "torch", "deepspeed", "horovod", "transformers", "numpy", "faiss-cpu", *PEERS)


def write_report(
    place: Path, summary: Mapping[str, float], rows: Sequence[Mapping[str, object]], *, ranks: int
) -> Path:
    """Writes `place/report.json` in one piece, so that a reader finds the old report or the new one.

    Args:
        place: folder, made where it is missing, by habit `out/<script name>`; or the file itself, if it ends in .json.
        summary: name to finite number; the name carries the unit (`step_ms`).
        rows: the table, one mapping a line.
        ranks: number of processes that took part.

    Raises:
        ValueError: a number of the summary is not finite; the message names it.
    """
    broken = [name for name, value in summary.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"summary of {place.name}: not a finite number: {', '.join(broken)}")
    report = {
        "summary": dict(summary),
        "rows": [dict(row) for row in rows],
        "environment": environment(ranks),
    }
    path = place if place.suffix == ".json" else place / "report.json"
    return write_text(path, json.dumps(report, indent=2) + "\n")


def environment(ranks: int) -> dict[str, Any]:
    """Commit, versions, cores, ranks and platform of this run, and the seconds since it began."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "cores": _cores(),
        "ranks": ranks,
        "platform": platform.platform(),
        "wall_s": round(time.monotonic() - STARTED, 1),
    }


def write_text(path: Path, text: str) -> Path:
    """Replaces `path` by `text` atomically; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)


def _versions() -> dict[str, str]:
    """Versions of those of `PACKAGES` that are installed."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def _commit() -> str:
    """The commit of the working tree, with `-dirty` behind it where files differ; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
