"""The benchmark of a buffer in a file, with a small file and a smaller page cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.benchmarks import file as bench_file
from tests.helpers.script_runs import read_report, run_module


def can_confine() -> bool:
    old, controllers = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/cgroup.subtree_control")
    available = old.is_dir() or (controllers.is_file() and "memory" in controllers.read_text().split())
    return os.geteuid() == 0 and available and os.access(old if old.is_dir() else old.parent, os.W_OK)


@pytest.mark.skipif(not can_confine(), reason="needs root and a memory cgroup")
def test_rows_that_are_asked_for_beforehand_cost_no_major_fault(tmp_path: Path) -> None:
    options = ["--cache-mb", 64, "--times", 4, "--rounds", 9, "--json", tmp_path / "report.json"]
    run_module("scripts.benchmarks.file", *options)
    report = read_report(tmp_path)
    ahead, on_demand = report["rows"]
    assert ahead["faults"] == report["summary"]["major_faults"] < 1 < on_demand["faults"]
    assert ahead["file_mb"] == 4 * ahead["cache_mb"] == 256


def test_without_a_cgroup_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit, match="takes root and a memory cgroup"), bench_file.confined(1 << 20):
        pytest.fail("it must not come here")
