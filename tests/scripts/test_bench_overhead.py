"""The benchmark of what a step pays, as a job of two ranks under the DeepSpeed launcher."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks import overhead as bench_overhead
from scripts.benchmarks.overhead import CONTROL, INLINE, PLAIN, SIDES, THREAD, Case
from scripts.benchmarks.overhead_model import RESNET_OPERATIONS, Gauge, Model, batch_of, passes_of
from scripts.benchmarks.overhead_sides import COUNTS, PHASES

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(row_bytes=4096, light=False, free_core=len(os.sched_getaffinity(0)) > 1, rounds=2, steps=3, step_ms=2)


@pytest.fixture(scope="module")
def rows(case: Case) -> Rows:
    return list(bench_overhead.lines(case, bench_overhead.run(case)))


def test_every_side_is_measured(rows: Rows) -> None:
    assert [row["engine"] for row in rows] == list(SIDES)
    assert rows[0]["ratio"] == rows[0]["cpu_ratio"] == 1.0
    assert all({"ratio", "ratio_low", "ratio_high", "cpu_ratio", "step_ms"} <= set(row) for row in rows)


def test_rehearsal_issues_two_collectives_a_step_and_replays_what_it_is_asked_for(rows: Rows) -> None:
    counts = [{name: row.get(name) for name in COUNTS} for row in rows]
    assert counts == [
        *2 * [{"collectives": None, "rows_replayed": None}],  # the plain side and the control have no rehearsal
        *2 * [{"collectives": 2.0, "rows_replayed": float(bench_overhead.REPLAYED)}],
    ]


def test_the_share_of_every_phase_is_told_of_sides_with_rehearsal(rows: Rows) -> None:
    assert [set(PHASES) & set(row) for row in rows] == [set(), set(), set(PHASES), set(PHASES)]
    assert all(row[name] > 0 for row in rows[2:] for name in PHASES)


def test_the_control_also_makes_two_bare_copies(rows: Rows) -> None:
    assert ["copies_ms" in row for row in rows] == [False, True, False, False]
    assert rows[1]["copies_ms"] > 0


def test_what_the_gauge_tells_is_of_the_same_machine_on_all_sides(rows: Rows) -> None:
    assert all(0.2 < row["unit_ratio"] < 5 for row in rows)
    assert any(row["unit_ratio"] != 1 for row in rows)


def test_turns_are_compared_within_their_round_in_units_of_the_gauge(case: Case) -> None:
    plain = {"wall_s": [1.0, 2.0], "cpu_s": [1.0, 1.0], "unit_s": [1.0, 1.0]}
    control = {"wall_s": [1.4, 3.2], "cpu_s": [1.0, 1.0], "unit_s": [1.0, 1.0]}
    slower = {"wall_s": [3.6, 1.95], "cpu_s": [3.0, 3.0], "unit_s": [2.0, 0.5], "written_ms": 4.0}
    lines = bench_overhead.lines(case, {PLAIN: plain, CONTROL: control, THREAD: slower})
    first, second, thread = lines
    assert (first["ratio"], second["ratio"]) == pytest.approx((1.0, 1.5))
    ratios = sorted([1.8 / 1.0, 1.8 / 1.4, 3.9 / 2.0, 3.9 / 3.2])
    assert thread["ratio"] == pytest.approx((ratios[1] + ratios[2]) / 2)
    assert thread["raw_ratio"] == pytest.approx((3.6 / 1 + 1.95 / 2) / 2)
    assert thread["unit_ratio"] == 1.25
    assert (thread["cpu_ratio"], thread["written_ms"]) == (3.75, 4.0)
    assert thread["step_ms"] == pytest.approx(1e3 * (3.6 + 1.95) / 2 / 3)


def line(engine: str, ratio: float, *, free: bool = False, light: bool = False, short: bool = False) -> dict[str, Any]:
    """A row of the report; where more is paid, rows are smaller."""
    case = {"engine": engine, "free_core": free, "light": light, "short": short, "ratio": ratio}
    return {**case, "step_bytes": 8 / ratio, "paid_ms": ratio, "copies_ms": 0.5}


def test_the_summary_has_the_largest_ratio_of_each_kind() -> None:
    rows = [
        line(PLAIN, 9.0),
        line(THREAD, 1.2),
        line(THREAD, 1.0),
        line(CONTROL, 1.0),
        line(INLINE, 1.3),
        line(THREAD, 1.05, free=True),
        line(CONTROL, 0.99, free=True),
        line(THREAD, 1.07, free=True, light=True),
        line(THREAD, 1.9, light=True, short=True),
    ]
    assert bench_overhead.summarise(rows) == {
        "paid_ms_small": 1.2,
        "paid_vs_copies_8mib": 2.0,
        "ratio_short_busy": 1.9,
        "ratio_busy": 1.2,
        "ratio_busy_inline": 1.3,
        "ratio_busy_control": 1.0,
        "ratio_free_core": 1.05,
        "ratio_free_core_control": 0.99,
        "ratio_free_core_light": 1.07,
    }


def test_only_the_largest_rows_also_meet_a_light_model() -> None:
    cases = list(bench_overhead.cases(True, 5, 4, 200))
    assert [(case.row_bytes, case.light) for case in cases] == [
        (16 << 10, False),
        (128 << 10, False),
        (1 << 20, False),
        (1 << 20, True),
    ]
    assert {case.free_core for case in cases} == {True}


def test_where_no_core_is_free_the_smallest_rows_meet_a_short_step_as_well() -> None:
    *others, short = bench_overhead.cases(False, 5, 4, 200)
    assert short == Case(16 << 10, light=True, free_core=False, rounds=5, steps=40, step_ms=20, short=True)
    assert not any(case.short for case in others)


def test_the_model_computes_as_much_for_a_byte_as_it_is_told() -> None:
    row_bytes, gauge = 128 << 10, Gauge()
    passes = passes_of(row_bytes, RESNET_OPERATIONS)
    x, label = batch_of(2, row_bytes)
    model = Model(passes, gauge).to(x.device)
    with FlopCounterMode(display=False) as counter:
        model(x, label).backward()
    of_gauge = 2 * passes * 2 * 128 * 512**2  # in every pass, forwards and backwards
    assert counter.get_total_flops() - of_gauge == pytest.approx(2 * row_bytes * RESNET_OPERATIONS, rel=0.05)


def test_the_gauge_is_not_moved_by_what_happens_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    gauge, seconds = Gauge(), itertools.cycle([1.0, 1.0, 1.0, 1.0, 9.0])
    clock = itertools.accumulate(second for length in seconds for second in (0.0, length))
    monkeypatch.setattr("scripts.benchmarks.overhead_model.time.thread_time", lambda: next(clock))
    for _ in range(10):
        gauge()
    assert gauge.take() == 1.0
