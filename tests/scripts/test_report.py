"""The report of a script: where it lies, what it holds, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.common import report


def test_a_report_has_summary_rows_and_environment(tmp_path: Path) -> None:
    path = report.write_report(tmp_path / "job", {"step_ms": 2.5}, [{"arm": "plain", "step": 1}], ranks=2)

    assert path == tmp_path / "job/report.json"
    written = json.loads(path.read_text())
    assert written["summary"] == {"step_ms": 2.5}
    assert written["rows"] == [{"arm": "plain", "step": 1}]
    assert set(written["environment"]) == {"commit", "versions", "cores", "ranks", "platform", "wall_s"}
    assert written["environment"]["ranks"] == 2
    assert written["environment"]["cores"] >= 1


def test_the_environment_names_the_versions_that_run() -> None:
    import torch

    assert report.environment(1)["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not a finite number: step_ms"):
        report.write_report(tmp_path, {"rows": 1, "step_ms": value}, [], ranks=1)
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = report.write_report(tmp_path, {"step_ms": 1.0}, [], ranks=1)

    with pytest.raises(TypeError):
        report.write_report(tmp_path, {"step_ms": 2.0}, [{"value": object()}], ranks=1)
    assert json.loads(path.read_text())["summary"] == {"step_ms": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_is_replaced_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report.write_text(tmp_path / "note", "old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        report.write_text(path, "new")
    assert path.read_text() == "old"


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    assert report.environment(1)["commit"] == "unknown"
