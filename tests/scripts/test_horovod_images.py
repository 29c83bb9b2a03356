"""The Horovod example, in small: it runs, and its report answers what it is for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.script_runs import read_report, run_module

pytestmark = pytest.mark.horovod


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("horovod.torch")
    folder = tmp_path_factory.mktemp("train_horovod")
    options = ["--ranks", 2, "--steps", 20, "--batch", 16, "--out", folder]
    (folder / "printed.txt").write_text(run_module("scripts.examples.horovod_images", *options))
    return folder


@pytest.fixture(scope="module")
def written(out: Path) -> dict[str, Any]:
    return read_report(out)


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
