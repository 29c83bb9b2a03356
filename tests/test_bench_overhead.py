"""The benchmark of what a step pays, as a job of two ranks under the DeepSpeed launcher."""

from __future__ import annotations

import bench_overhead
import pytest
from bench_overhead import CONTROL, COUNTS, ENGINES, INLINE, PHASES, PLAIN, THREAD, Case

pytest.importorskip("deepspeed")

Rows = list[dict[str, object]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    case = Case(row_bytes=4096, free_core=False, rounds=2, steps=3, step_ms=2)
    return list(bench_overhead.lines(case, [bench_overhead.run(case)]))


def test_every_engine_is_measured_against_the_plain_one(rows: Rows) -> None:
    assert [row["engine"] for row in rows] == list(ENGINES)
    assert rows[0]["ratio"] == rows[0]["cpu_ratio"] == 1.0
    assert all({"ratio", "ratio_low", "ratio_high", "cpu_ratio", "step_ms"} <= set(row) for row in rows)


def test_rehearsal_issues_two_collectives_a_step_and_replays_what_it_is_asked_for(rows: Rows) -> None:
    counts = [{name: row.get(name) for name in COUNTS} for row in rows]
    assert counts == [
        *2 * [{"collectives": None, "rows_replayed": None}],  # the plain engine and the control have no rehearsal
        *2 * [{"collectives": 2.0, "rows_replayed": float(bench_overhead.REPLAYED)}],
    ]


def test_the_share_of_every_phase_is_told_of_engines_with_rehearsal(rows: Rows) -> None:
    assert [set(PHASES) & set(row) for row in rows] == [set(), set(), set(PHASES), set(PHASES)]


def test_the_summary_has_the_largest_ratio_of_each_kind() -> None:
    rows = [
        {"engine": engine, "free_core": free, "ratio": ratio}
        for engine, free, ratio in [
            (PLAIN, False, 9.0),
            (THREAD, False, 1.2),
            (THREAD, False, 1.1),
            (INLINE, False, 1.3),
            (THREAD, True, 1.05),
            (CONTROL, True, 0.99),
        ]
    ]
    assert bench_overhead.summarise(rows) == {
        "ratio_busy": 1.2,
        "ratio_busy_inline": 1.3,
        "ratio_free_core": 1.05,
        "ratio_free_core_control": 0.99,
    }


def test_the_turns_of_all_jobs_count_alike() -> None:
    case = Case(row_bytes=16, free_core=True, rounds=2, steps=5, step_ms=1)
    plain = {"wall_s": [1.0, 2.0], "cpu_s": [1.0, 1.0, 1.0]}
    slower = {"wall_s": [1.2, 2.2], "cpu_s": [3.0, 3.0, 3.0], "written_ms": 4.0}
    slowest = {"wall_s": [1.4, 3.0], "cpu_s": [3.0, 3.0, 3.0], "written_ms": 6.0}
    jobs: list[bench_overhead.Measured] = [
        {PLAIN: plain, CONTROL: plain, THREAD: one, INLINE: one} for one in (slower, slowest)
    ]
    thread = next(line for line in bench_overhead.lines(case, jobs) if line["engine"] == THREAD)
    assert thread["ratio"] == pytest.approx(1.3)  # of 1.1, 1.2, 1.4 and 1.5
    assert (thread["cpu_ratio"], thread["written_ms"], thread["jobs"]) == (3.0, 5.0, 2)
    assert thread["step_ms"] == pytest.approx(360)
