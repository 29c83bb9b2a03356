"""The benchmark of what a step pays, as a job of two ranks under the DeepSpeed launcher."""

from __future__ import annotations

import bench_overhead
import pytest
from bench_overhead import COUNTS, ENGINES, INLINE, PHASES, PLAIN, THREAD, Case

pytest.importorskip("deepspeed")

Rows = list[dict[str, object]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return bench_overhead.run(Case(row_bytes=4096, free_core=False, rounds=2, steps=3, step_ms=2))


def test_every_engine_is_measured_against_the_plain_one(rows: Rows) -> None:
    assert [row["engine"] for row in rows] == list(ENGINES)
    assert rows[0]["ratio"] == rows[0]["cpu_ratio"] == 1.0
    assert all({"ratio", "ratio_low", "ratio_high", "cpu_ratio", "step_ms"} <= set(row) for row in rows)


def test_rehearsal_issues_two_collectives_a_step_and_replays_what_it_is_asked_for(rows: Rows) -> None:
    counts = [{name: row.get(name) for name in COUNTS} for row in rows]
    assert counts == [
        {"collectives": None, "rows_replayed": None},  # the plain engine has no rehearsal
        *2 * [{"collectives": 2.0, "rows_replayed": float(bench_overhead.REPLAYED)}],
    ]


def test_the_share_of_every_phase_is_told_of_engines_with_rehearsal(rows: Rows) -> None:
    assert [set(PHASES) & set(row) for row in rows] == [set(), set(PHASES), set(PHASES)]


def test_the_summary_has_the_largest_ratio_of_each_kind() -> None:
    rows = [
        {"engine": engine, "free_core": free, "ratio": ratio}
        for engine, free, ratio in [
            (PLAIN, False, 9.0),
            (THREAD, False, 1.2),
            (THREAD, False, 1.1),
            (INLINE, False, 1.3),
            (THREAD, True, 1.05),
        ]
    ]
    assert bench_overhead.summarise(rows) == {
        "ratio_busy": 1.2,
        "ratio_busy_inline": 1.3,
        "ratio_free_core": 1.05,
    }
