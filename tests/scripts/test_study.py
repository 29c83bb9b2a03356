"""The shared parts of the studies: the grid, the files of arms, the numbers of the tables, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.common.goals import Goal
from scripts.common.spread import Spread
from scripts.studies import page as study_page
from scripts.studies.arms import METHODS, Arm, Row, arm_grid, evaluation_row
from scripts.studies.results import Metric, find_group, group_seeds, table_cells
from scripts.studies.run_arms import ArmResults

ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True)
ERROR = Metric("error", "error", higher_is_better=False)
ER = Arm("er", 10.0, 0, 32)


def run(arm: Arm, *evaluations: list[float], metric: str = "accuracy", seconds: float = 1.0) -> list[Row]:
    """Rows of an arm that was evaluated after every task."""
    return [
        evaluation_row(arm, after, {metric: values}, seconds=seconds * after, buffer_mib=2.0)
        for after, values in enumerate(evaluations, 1)
    ]


def test_the_grid_has_every_method_buffer_and_seed_once_and_the_bounds_without_a_buffer() -> None:
    arms = arm_grid((2.5, 30.0), (0, 1), representatives=8)

    assert len(arms) == len(set(arms)) == 2 * (2 + 3 * 2)
    assert {arm.method for arm in arms} == set(METHODS)
    assert {(arm.buffer_percent, arm.representatives) for arm in arms if arm.method == "incremental"} == {(0.0, 0)}
    assert [arm.seed for arm in arms] == sorted(arm.seed for arm in arms)


def test_a_row_has_a_value_for_every_task_and_what_the_arm_is() -> None:
    line = evaluation_row(ER, 2, {"accuracy": [0.5, 0.75]}, seconds=3.0, buffer_mib=1.5, lr=0.1)

    assert line["accuracy_task_1"] == 0.5
    assert line["accuracy_task_2"] == 0.75
    assert (line["method"], line["buffer_percent"], line["seed"], line["after_task"]) == ("er", 10.0, 0, 2)
    assert line["lr"] == 0.1


def test_seeds_are_put_together_with_mean_and_standard_deviation() -> None:
    rows = run(ER, [0.9, 0.0], [0.5, 0.9], seconds=1.0)
    rows += run(Arm("er", 10.0, 1, 32), [0.9, 0.0], [0.7, 0.9], seconds=3.0)
    (one,) = group_seeds(rows, ACCURACY)

    assert one.seeds == 2
    assert one.average.mean == pytest.approx(0.75)
    assert one.average.deviation == pytest.approx(0.05 * 2**0.5)  # of 0.7 and 0.8, with one degree of freedom less
    assert [task.mean for task in one.tasks] == pytest.approx([0.6, 0.9])
    assert one.seconds.mean == pytest.approx(4.0)
    assert one.buffer_mib == 2.0


def test_a_single_seed_has_no_deviation() -> None:
    assert Spread.of([0.5]) == (0.5, None)
    assert Spread.of([0.5]).text() == "0.500"
    assert Spread.of([0.5, 0.7]).text(2) == "0.60 ± 0.14"


def test_forgetting_is_what_was_lost_since_the_best_evaluation_after_the_task() -> None:
    (one,) = group_seeds(run(ER, [0.8, 0.9, 0.0], [0.9, 0.7, 0.0], [0.5, 0.8, 1.0]), ACCURACY)

    # 0.9 to 0.5, and 0.7 to 0.8: that the second task was at 0.9 before it was trained does not count.
    assert one.forgetting is not None
    assert one.forgetting.mean == pytest.approx((0.4 - 0.1) / 2)


@pytest.mark.parametrize(("best", "learnt"), [(0.54, False), (0.56, True)])
def test_what_hardly_beats_a_constant_answer_is_not_learnt(best: float, learnt: bool) -> None:
    constants = {"accuracy_constant_task_1": 0.5, "accuracy_constant_task_2": 0.5}
    rows = [line | constants for line in run(ER, [best, 0.0], [0.3, best])]
    groups = group_seeds(rows, ACCURACY)

    assert groups[0].learnt is learnt
    assert ("not learnt" in table_cells(groups, tasks=False)[1][0]) is not learnt


def test_an_error_is_forgotten_when_it_rises() -> None:
    (one,) = group_seeds(run(ER, [0.2, 0.9], [0.5, 0.3], metric="error"), ERROR)

    assert one.forgetting is not None
    assert one.forgetting.mean == pytest.approx(0.3)


def test_one_evaluation_tells_nothing_of_forgetting() -> None:
    (one,) = group_seeds(
        [evaluation_row(Arm("from scratch", 0.0, 0), 2, {"accuracy": [0.9, 0.8]}, seconds=1, buffer_mib=0)], ACCURACY
    )

    assert one.forgetting is None
    assert one.average.mean == pytest.approx(0.85)


def test_the_curve_averages_over_the_tasks_trained_so_far() -> None:
    (one,) = group_seeds(run(ER, [0.8, 0.1], [0.6, 0.9]), ACCURACY)

    assert {after: spread.mean for after, spread in one.curve.items()} == pytest.approx({1: 0.8, 2: 0.75})


def test_ten_tasks_stay_in_order() -> None:
    (one,) = group_seeds(run(ER, [task / 10 for task in range(11)]), ACCURACY)

    assert [task.mean for task in one.tasks] == [task / 10 for task in range(11)]


def test_groups_come_in_the_order_of_methods_and_buffers_and_tables_stay_apart() -> None:
    arms = [Arm("der", 5.0, 0, 32), Arm("er", 30.0, 0, 32), Arm("er", 2.5, 0, 32), Arm("incremental", 0.0, 0)]
    rows = [line for arm in arms for line in run(arm, [0.5])]
    rows += run(Arm("er", 10.0, 0, 8, None, "rows"), [0.5]) + run(Arm("er", 10.0, 0, 8, 4, "rows"), [0.5])
    rows.append({"table": "time", "pair": 1})

    order = [(one.arm.method, one.arm.buffer_percent) for one in group_seeds(rows, ACCURACY)]
    assert order == [("incremental", 0.0), ("er", 2.5), ("er", 30.0), ("der", 5.0)]
    assert [one.arm.candidates for one in group_seeds(rows, ACCURACY, "rows")] == [4, None]


def test_an_arm_that_was_not_trained_is_named() -> None:
    with pytest.raises(KeyError, match=r"no arm 'der' with a buffer of 2.5 %"):
        find_group(group_seeds(run(ER, [0.5]), ACCURACY), "der", 2.5)


def test_a_table_has_a_column_for_every_task_where_asked() -> None:
    groups = group_seeds(run(ER, [0.5, 0.6]), ACCURACY)
    heads, lines = table_cells(groups, tasks=True)

    assert heads == ["method", "buffer", "average", "task 1", "task 2", "forgetting", "s", "MiB"]
    assert lines == [["er", "10 %", "0.550", "0.500", "0.600", "", "1.0", "2.0"]]
    assert len(table_cells(groups, tasks=False)[1][0]) == 6


def test_results_of_an_arm_are_loaded_for_the_same_settings_only(tmp_path: Path) -> None:
    results = ArmResults(tmp_path / "arms", {"steps": 10})
    rows = run(ER, [0.5])
    results.save(ER, rows)

    assert results.load(ER) == rows
    assert results.load(Arm("er", 10.0, 1, 32)) is None
    assert ArmResults(tmp_path / "arms", {"steps": 11}).load(ER) is None


def report(study: study_page.Study, **summary: float) -> dict[str, Any]:
    """A report as the study writes it."""
    rows = []
    for arm in arm_grid((2.5, 30.0), (0, 1), representatives=8):
        values = {metric.name: [0.5 + 0.1 * arm.seed, 0.25] for metric in study.metrics}
        rows += [evaluation_row(arm, after, values, seconds=1.0, buffer_mib=1.0) for after in (1, 2)]
    environment = {"ranks": 2, "cores": 4, "commit": "0123456789abcdef", "versions": {"torch": "2.0"}}
    met = {goal.key: goal.bound + (0.1 if goal.above else 0.0) for goal in study.goals}
    return {"summary": {**met, **summary}, "rows": rows, "environment": environment}


def test_the_page_has_every_goal_and_says_by_how_much_one_is_missed(tmp_path: Path) -> None:
    for study in study_page.STUDIES:
        short = {"er_ratio_30": 0.9} if study is study_page.CLASSIFICATION else {}
        (tmp_path / "out" / study.folder).mkdir(parents=True)
        (tmp_path / "out" / study.folder / "report.json").write_text(json.dumps(report(study, **short)))
    page = study_page.build(tmp_path / "out", tmp_path / "docs").read_text()

    assert "| ≥ 0.95 | 0.900 | short by 0.050 |" in page
    assert page.count("| met |") == sum(len(study.goals) for study in study_page.STUDIES) - 1
    assert "| er | 2.5 % | 0.400 ± 0.035 |" in page
    pictures = sorted(path.name for path in (tmp_path / "docs/images").iterdir())
    assert len(pictures) == sum(len(study.metrics) for study in study_page.STUDIES)
    assert all(f"images/{name}" in page for name in pictures)


def test_a_missing_report_is_named_with_the_command_that_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study_page.main(["--reports", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 1
    assert "python -m scripts.studies.classification --size full" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_a_goal_to_be_exceeded_is_missed_by_its_very_bound() -> None:
    goal = Goal("kept", "share", 0.0, above=True)

    assert goal.line(0.0)[1:] == ["> 0", "0.000", "short by 0.000"]
    assert goal.line(0.001)[-1] == "met"
