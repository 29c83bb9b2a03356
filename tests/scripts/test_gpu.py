"""The pack of checks for a GPU runs to its end without one, and says what it left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.gpu.parts import PARTS, Part
from scripts.gpu.run import outcome
from tests.helpers.paths import ROOT

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_it_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", "scripts/gpu.sh", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    report = json.loads((tmp_path / "report.json").read_text())
    outcomes = {row["part"]: row["outcome"] for row in report["rows"]}
    assert {name for name, one in outcomes.items() if one == "skipped: no GPU"} == {"tests", "nccl_1", "nccl_2"}
    assert {name for name, one in outcomes.items() if one == "passed"} == {
        "identity", "gloo_2", "copies", "overhead", "compiled",
    }  # fmt: skip
    assert report["summary"]["identity_alike"] == report["summary"]["identity_compared"] == 4
    assert report["summary"]["gloo_2_rows_received"] > 0
    assert report["summary"]["overhead_ratio_wall_20ms"] > 0


@pytest.mark.parametrize(
    ("code", "good", "state"),
    [
        ("pass", (0,), "passed"),
        ("raise SystemExit(5)", (0, 5), "passed"),
        ("raise SystemExit(3)", (0,), "failed: exit status 3, see log.txt"),
        ("import time; time.sleep(60)", (0,), "failed: no end within 6 s"),
    ],
)
def test_a_part_that_fails_or_does_not_end_is_told(
    code: str, good: tuple[int, ...], state: str, tmp_path: Path
) -> None:
    part = Part("one", 0, 60, ("-c", code), good)
    with (tmp_path / "log.txt").open("w") as log:
        row = outcome(part, 0, 6.0, tmp_path, log)
    assert row["outcome"] == state


def test_a_part_is_skipped_where_gpus_or_time_are_missing(tmp_path: Path) -> None:
    two = next(part for part in PARTS if part.gpus == 2)
    with (tmp_path / "log.txt").open("w") as log:
        assert outcome(two, 1, 60, tmp_path, log)["outcome"] == "skipped: 1 of 2 GPUs"
        assert outcome(two, 2, 1, tmp_path, log)["outcome"] == "skipped: no time left"


def test_figures_are_those_that_a_part_left_behind_now(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"old": 1}')
    write = "import sys, json; json.dump(dict(new=2.0), open(sys.argv[1], 'w'))"
    with (tmp_path / "log.txt").open("w") as log:
        assert outcome(Part("one", 0, 60, ("-c", write, "{out}")), 0, 60, tmp_path, log)["figures"] == {"new": 2.0}
        assert outcome(Part("one", 0, 60, ("-c", "pass")), 0, 60, tmp_path, log)["figures"] == {}


def test_no_part_may_take_half_of_the_minutes() -> None:
    assert max(part.limit_s for part in PARTS) < 8 * 60 / 2
