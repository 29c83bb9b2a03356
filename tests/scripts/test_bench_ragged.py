"""The benchmark of rows of different length, with few of them."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.script_runs import read_report, run_module


def test_rows_of_different_length_take_little_more_than_their_bytes(tmp_path: Path) -> None:
    options = ["--admissions", 12_000, "--capacity", 4_000, "--rounds", 5, "--json", tmp_path / "report.json"]
    run_module("scripts.benchmarks.ragged", *options)
    report = read_report(tmp_path)
    assert report["summary"]["held_vs_stored"] < 1.15
    assert report["summary"]["padded_vs_stored"] > 10
    assert 1 < report["summary"]["moved_vs_written"] < 12
    assert [row["operation"] for row in report["rows"]] == ["S14", "W14", "G7", "G64"]
