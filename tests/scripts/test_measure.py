"""Measuring: turns, medians, ratios within a round, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.benchmarks import measure as bench


def test_alternatives_take_turns_and_every_round_begins_with_another() -> None:
    called: list[str] = []

    timings = bench.measure({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, rounds=3, warmup=0)

    assert called == ["a", "b", "b", "a", "a", "b"]
    assert [timing.rounds for timing in timings.values()] == [3, 3]


def test_warming_up_and_several_calls_a_round_give_one_value_a_round() -> None:
    called: list[str] = []

    timings = bench.measure({"a": lambda: called.append("a")}, rounds=4, calls=5, warmup=2)

    assert len(called) == (4 + 2) * 5
    assert len(timings["a"].wall_s) == len(timings["a"].cpu_s) == 4


def test_a_ratio_is_that_of_the_rounds_and_not_of_the_medians() -> None:
    slowdown = bench.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])

    assert (slowdown.median, slowdown.low, slowdown.high) == (2.0, 2.0, 2.0)
    assert bench.ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == bench.Ratio(3.0, 2.0, 4.0)


def test_a_ratio_of_unequal_numbers_of_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        bench.ratio([1.0, 2.0], [1.0])


def test_a_report_tells_the_load_the_commit_and_the_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results/bench.json"

    bench.publish(path, {"calls": 2}, [{"name": "a"}], ranks=2)

    written = json.loads(path.read_text())
    assert written["summary"].keys() == {"calls", "load"}
    assert written["environment"]["commit"] in (printed := capsys.readouterr().out)
    assert "torch " in printed
