"""The Horovod example, in small: it runs, and its report answers what it is for."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.horovod


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("horovod.torch")
    folder = tmp_path_factory.mktemp("train_horovod")
    command = [sys.executable, "-m", "scripts.examples.horovod_images", "--ranks", "2", "--steps", "20"]
    command += ["--batch", "16", "--out", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def written(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_the_summary_has_both_accuracies_and_whether_ranks_agree(written: dict[str, Any]) -> None:
    summary = written["summary"]
    assert {"accuracy_naive", "accuracy_rehearsal", "ranks_identical"} <= set(summary)
    assert all(math.isfinite(value) for value in summary.values())
    assert summary["ranks_identical"] == 1.0
    assert summary["accuracy_rehearsal"] > summary["accuracy_naive"]


def test_both_arms_are_evaluated_after_every_task(written: dict[str, Any]) -> None:
    assert [(row["arm"], row["after_task"]) for row in written["rows"]] == [
        (arm, task) for arm in ("naive", "rehearsal") for task in range(1, 6)
    ]
    assert written["environment"]["ranks"] == 2


def test_the_table_and_the_picture_are_there(out: Path) -> None:
    assert "identical in every bit" in (out / "printed.txt").read_text()
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
