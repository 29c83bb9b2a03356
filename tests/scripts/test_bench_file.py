"""The benchmark of a buffer in a file, with a small file and a smaller page cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks import file as bench_file

SCRIPT = ("-m", "scripts.benchmarks.file")


def can_confine() -> bool:
    old, controllers = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/cgroup.subtree_control")
    given = old.is_dir() or (controllers.is_file() and "memory" in controllers.read_text().split())
    return os.geteuid() == 0 and given and os.access(old if old.is_dir() else old.parent, os.W_OK)


@pytest.mark.skipif(not can_confine(), reason="needs root and a memory cgroup")
def test_rows_that_are_asked_for_beforehand_cost_no_major_fault(tmp_path: Path) -> None:
    arguments = ["--cache-mb", "64", "--times", "4", "--rounds", "9", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(
        [sys.executable, *SCRIPT, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    ahead, on_demand = report["rows"]
    assert ahead["faults"] == report["summary"]["major_faults"] < 1 < on_demand["faults"]
    assert ahead["file_mb"] == 4 * ahead["cache_mb"] == 256


def test_without_a_cgroup_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit, match="takes root and a memory cgroup"), bench_file.confined(1 << 20):
        pytest.fail("it must not come here")
