"""The benchmark of growth: its points, its exponents, its page, and a few real steps."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.benchmarks.growth import AXES, Point, exponent, measure, points, summarise
from scripts.benchmarks.page_growth import build_growth


def test_every_axis_changes_one_quantity_and_ends_where_it_is_told_to() -> None:
    for axis in AXES:
        jobs = points(axis, 20_000)
        assert jobs
        assert [getattr(job, axis) for job in jobs] == [v for v in AXES[axis] if isinstance(v, str) or v <= 20_000]
    assert all(job.rows * job.row_bytes <= 4 << 30 for axis in AXES for job in points(axis, math.inf))
    assert all(job.rows >= job.partitions for job in points("partitions", math.inf))


def test_the_exponent_is_that_of_the_end() -> None:
    assert exponent([1, 10, 100], [5, 5, 50]) == pytest.approx(1.0)
    assert exponent([1, 10, 100], [1, 10, 10]) == pytest.approx(0.0)
    assert exponent([7], [1.0]) == 0.0


def test_the_largest_exponent_is_told_and_neither_policies_nor_pauses_have_one() -> None:
    costs = {1: 10.0, 10: 10.0, 100: 1000.0}
    rows = [{"axis": "ranks", "ranks": n, "training_us": cost, "background_us": 0.0} for n, cost in costs.items()]
    rows += [{"axis": "policy", "policy": "fifo", "training_us": 1.0, "background_us": 1.0}]
    rows += [{"axis": "pause_ms", "pause_ms": n, "training_us": n**3, "background_us": 0.0} for n in (1, 5)]
    assert summarise(rows) == pytest.approx({"exponent_max": 2.0, "exponent_ranks": 2.0})
    rows += [{"axis": "loop", "training_us": 180.0, "background_us": 700.0}]
    summary = summarise(rows)
    assert (summary["paid_ms_loop"], summary["background_ms_loop"]) == pytest.approx((0.18, 0.7))


def test_what_the_nearest_rows_add_is_that_of_the_best_index() -> None:
    costs = {"none": 600.0, "flat": 40_600.0, "hnsw": 4_600.0}
    rows = [
        {"axis": "index", "index": index, "training_us": 100.0, "background_us": cost} for index, cost in costs.items()
    ]
    assert summarise(rows) == pytest.approx({"retrieved_ms": 4.0})


@pytest.mark.parametrize(
    "point",
    [
        Point(ranks=2, rows=64),
        Point(rows=100, row_bytes=32, mmap=True),
        Point(rows=100, row_bytes=32, partitions=10, micro_batches=2),
        *(Point(rows=64, policy=policy) for policy in AXES["policy"][1:]),
        pytest.param(
            Point(rows=64, index="flat"), marks=pytest.mark.skipif(not find_spec("faiss"), reason="needs faiss")
        ),
    ],
    ids=lambda point: f"{point.policy}-{point.ranks}-{point.partitions}-{point.index}",
)
def test_a_point_is_a_real_job(point: Point) -> None:
    row = measure(point, steps=4, blocks=2)
    assert row["training_us"] > 0
    assert row["background_us"] > 0
    assert (row["ranks"], row["policy"]) == (point.ranks, point.policy)


def test_a_job_with_pauses_has_a_control_beside_it() -> None:
    assert measure(Point(rows=64, pause_ms=1), steps=4, blocks=2)["control_us"] > 0
    assert "control_us" not in measure(Point(rows=64), steps=4, blocks=2)


def test_the_page_has_a_figure_and_a_table_of_each_quantity(tmp_path: Path) -> None:
    assert build_growth(tmp_path) is None
    place = {"cores": 2, "versions": {"torch": "2.13"}, "commit": "0" * 40}
    rows = [
        {"axis": axis, axis: value, "training_us": 250.0, "background_us": 1000.0}
        for axis, values in AXES.items()
        for value in values[:2]
    ]
    for row in rows:
        if row["axis"] == "pause_ms":
            row["control_us"] = 77.0
    (tmp_path / "results").mkdir()
    summary = {"load": 1.0, "steps": 20, "blocks": 3, "exponent_max": 1.5}
    report = {"summary": summary, "rows": rows, "environment": place}
    (tmp_path / "results/bench_growth.json").write_text(json.dumps(report))
    path = build_growth(tmp_path)
    assert path is not None
    page = path.read_text()
    assert "| `exponent_max`: the largest exponent | ≤ 1.1 | 1.500 | short by 0.400 |" in page
    assert page.count("| 250 | 1,000 |") == 2 * len(AXES)
    assert page.count("| 250 | 1,000 | 77 |") == 2
    assert "`python -m scripts.benchmarks.growth --steps 20 --blocks 3`; 2 cores" in page
    assert all(f"](../images/growth_{axis}.png)" in page for axis in AXES)
    assert len(list((tmp_path / "images").iterdir())) == len(AXES)
