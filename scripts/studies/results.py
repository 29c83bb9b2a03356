"""Results of a study: the rows of its arms put together over the seeds, for tables and curves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.common.spread import Spread
from scripts.studies.arms import METHODS, Arm, Row

__all__ = ["NOT_LEARNT", "Group", "Metric", "find_group", "group_seeds", "table_cells"]

NOT_LEARNT = "not learnt"
"""Stands in tables for a forgetting that says nothing, as there was nothing to forget."""

LEAST_LEARNT = 0.1
"""The share of what the best constant answer lacks that a method has to make good."""


@dataclass(frozen=True)
class Metric:
    """A value that every task has in every row, called `<name>_task_<number>`; shown with so many digits."""

    name: str
    label: str
    higher_is_better: bool
    digits: int = 3


@dataclass(frozen=True)
class Group:
    """Results of one arm over its seeds, at the end of training.

    Attributes:
        arm: With the first seed.
        seeds: Number of seeds.
        curve: By evaluation, tasks trained and the mean value over the tasks trained so far.
        tasks: Value of each task.
        average: Mean value over the tasks.
        forgetting: Mean over the tasks of how much worse they are than they once were; None after one evaluation.
        learnt: Whether the tasks, each at its best, beat the best constant answer; True where rows do not tell.
        seconds: Training time.
        buffer_mib: Memory of the stored rows of all ranks.
    """

    arm: Arm
    seeds: int
    curve: dict[int, Spread]
    tasks: list[Spread]
    average: Spread
    forgetting: Spread | None
    learnt: bool
    seconds: Spread
    buffer_mib: float


def group_seeds(rows: Iterable[Row], metric: Metric, table: str = "buffers") -> list[Group]:
    """Put the seeds together; in the order of `METHODS`, then of buffers, representatives and candidates."""
    runs: dict[Arm, dict[int, list[Row]]] = {}
    for line in rows:
        if line["table"] == table:
            arm = Arm(**{name: line[name] for name in Arm.__dataclass_fields__} | {"seed": 0})
            runs.setdefault(arm, {}).setdefault(line["seed"], []).append(line)
    return [_group(arm, list(runs[arm].values()), metric) for arm in sorted(runs, key=_order)]


def find_group(groups: Sequence[Group], method: str, buffer_percent: float = 0.0) -> Group:
    """The group of a method and a buffer.

    Raises:
        KeyError: It was not trained.
    """
    for one in groups:
        if (one.arm.method, one.arm.buffer_percent) == (method, buffer_percent):
            return one
    raise KeyError(f"the study has no arm '{method}' with a buffer of {buffer_percent:g} %")


def table_cells(groups: Iterable[Group], *, tasks: bool, digits: int = 3) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table; with a column a task where `tasks` is true."""
    chosen = list(groups)
    numbers = [f"task {number}" for number in range(1, len(chosen[0].tasks) + 1)] if tasks else []
    draws = ["r", "c"] if chosen[0].arm.table == "rows" else []
    heads = ["method", "buffer", *draws, "average", *numbers, "forgetting", "s", "MiB"]
    return heads, [_line(one, tasks, digits) for one in chosen]


def _line(one: Group, tasks: bool, digits: int) -> list[str]:
    values = [value.text(digits) for value in one.tasks] if tasks else []
    forgetting = "" if one.forgetting is None else one.forgetting.text(digits) if one.learnt else NOT_LEARNT
    buffer = f"{one.arm.buffer_percent:g} %" if one.arm.buffer_percent else ""
    memory = f"{one.buffer_mib:.1f}" if one.buffer_mib else ""
    draws = [str(one.arm.representatives), str(one.arm.candidates or "all")] if one.arm.table == "rows" else []
    start = [one.arm.method, buffer, *draws, one.average.text(digits)]
    return [*start, *values, forgetting, one.seconds.text(1), memory]


def _order(arm: Arm) -> tuple[int, float, int, float]:
    candidates = float("inf") if arm.candidates is None else arm.candidates
    return METHODS.index(arm.method), arm.buffer_percent, arm.representatives, candidates


def _group(arm: Arm, runs: Sequence[list[Row]], metric: Metric) -> Group:
    runs = [sorted(run, key=lambda line: int(line["after_task"])) for run in runs]
    trained = [int(line["after_task"]) for line in runs[0]]
    values = np.stack([[_values(line, metric) for line in run] for run in runs])
    forgotten = [_forgetting(one, trained, metric) for one in values]
    return Group(
        arm=arm,
        seeds=len(runs),
        curve={t: Spread.of(values[:, i, :t].mean(axis=1)) for i, t in enumerate(trained)},
        tasks=[Spread.of(values[:, -1, task]) for task in range(values.shape[2])],
        average=Spread.of(values[:, -1].mean(axis=1)),
        forgetting=Spread.of([one for one in forgotten if one is not None]) if None not in forgotten else None,
        learnt=_learnt(values, [_values(run[-1], metric, "_constant") for run in runs], metric),
        seconds=Spread.of([run[-1]["seconds"] for run in runs]),
        buffer_mib=float(np.mean([run[-1]["buffer_mib"] for run in runs])),
    )


def _learnt(values: NDArray[np.float64], constants: Sequence[Sequence[float]], metric: Metric) -> bool:
    """Whether the tasks beat the constant answers `[seeds][tasks]`; `values` are `[seeds, evaluations, tasks]`."""
    best = values.max(axis=1) if metric.higher_is_better else values.min(axis=1)
    perfect = 1.0 if metric.higher_is_better else 0.0
    lacking, still = (np.abs(perfect - np.asarray(one)).mean() if len(one[0]) else None for one in (constants, best))
    return lacking is None or bool(still <= (1 - LEAST_LEARNT) * lacking)


def _values(line: Row, metric: Metric, of: str = "") -> list[float]:
    """The metric's value for task 1, 2 and so on; with `of` that of another answer."""
    names = sorted((name for name in line if re.fullmatch(rf"{metric.name}{of}_task_\d+", name)), key=_number)
    return [float(line[name]) for name in names]


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _forgetting(values: NDArray[np.float64], trained: Sequence[int], metric: Metric) -> float | None:
    """Mean fall of the tasks from their best value after their own training to the last one.

    Args:
        values: `[evaluations, tasks]` float64.
        trained: Tasks trained at each evaluation.
        metric: Says which way is better.
    """
    from rehearsal_plugin.evaluation import Transfer  # brings torch, which processes that only simulate do without

    # What a task was worth before its own training is no knowledge to lose: the worst value takes its place.
    worst = -np.inf if metric.higher_is_better else np.inf
    transfer = Transfer(lower_is_better=not metric.higher_is_better)
    for evaluation, count in zip(values, trained, strict=True):
        transfer.add(np.where(np.arange(len(evaluation)) < count, evaluation, worst).tolist())
    return transfer.figures().get("forgetting")
