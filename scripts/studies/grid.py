"""What the studies share: the grid of arms, means over seeds, tables and curves.

An arm is one way of training: a method, a size of the buffer, a seed. Its result is rows of a report, one for each
evaluation, with a value a task for every metric::

    {"table": "buffers", "method": "er", "buffer_percent": 5.0, "seed": 0, "representatives": 32, "candidates": null,
     "after_task": 3, "accuracy_task_1": 0.91, ..., "seconds": 21.3, "buffer_mib": 2.4}

Nothing here knows what is learnt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BUFFERS",
    "DER",
    "DERPP",
    "ER",
    "INCREMENTAL",
    "METHODS",
    "REPLAYING",
    "SCRATCH",
    "Arm",
    "Group",
    "Metric",
    "Row",
    "Spread",
    "cells",
    "find",
    "grid",
    "group",
    "print_table",
    "row",
]

SCRATCH, INCREMENTAL, ER, DER, DERPP = METHODS = ("from scratch", "incremental", "er", "der", "der++")
REPLAYING = (ER, DER, DERPP)
BUFFERS = (2.5, 5.0, 10.0, 20.0, 30.0)
"""Rows of all ranks' buffers together, in percent of the training data."""

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A value that every task has in every row, called `<name>_task_<number>`; shown with so many digits."""

    name: str
    label: str
    higher_is_better: bool
    digits: int = 3


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        method: One of `METHODS`.
        buffer_percent: Capacity of all ranks together, in percent of the training data; 0 without a buffer.
        seed: Of weights, batches and draws.
        representatives: Replayed rows a step and rank, of all draws together; 0 without a buffer.
        candidates: Rows a step and rank that are offered to the buffer; None for all.
        table: The table of the study that the arm belongs to: `buffers`, or `rows` (against r and c).
    """

    method: str
    buffer_percent: float
    seed: int
    representatives: int = 0
    candidates: int | None = None
    table: str = "buffers"

    @property
    def name(self) -> str:
        """For a person, and with the blanks replaced for a file."""
        buffer = f" {self.buffer_percent:g} %" if self.buffer_percent else ""
        rows = f" r {self.representatives} c {self.candidates or 'all'}" if self.table == "rows" else ""
        return f"{self.method}{buffer}{rows} seed {self.seed}"


def grid(buffers: Iterable[float], seeds: Iterable[int], representatives: int) -> list[Arm]:
    """Every method with every buffer and seed; seed by seed, so that half a study is still a study."""
    sizes = tuple(buffers)
    return [
        arm
        for seed in seeds
        for arm in (
            *(Arm(method, 0.0, seed) for method in (SCRATCH, INCREMENTAL)),
            *(Arm(method, size, seed, representatives) for size in sizes for method in REPLAYING),
        )
    ]


def row(
    arm: Arm, after_task: int, values: Mapping[str, Sequence[float]], *, seconds: float, buffer_mib: float, **more: Any
) -> Row:
    """One evaluation as a line of the report.

    Args:
        arm: Who was evaluated.
        after_task: Tasks trained so far.
        values: By name of the metric, a value for each task.
        seconds: Training time so far, without evaluations.
        buffer_mib: Memory of the stored rows of all ranks.
        more: Whatever else the study wants to keep.
    """
    tasks = {f"{name}_task_{task}": value for name, line in values.items() for task, value in enumerate(line, 1)}
    return {**asdict(arm), "after_task": after_task, **tasks, "seconds": seconds, "buffer_mib": buffer_mib, **more}


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; the deviation of a single seed is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.float64]) -> Spread:
        """Of at least one value."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)

    def text(self, digits: int = 3) -> str:
        """`0.853 ± 0.004`."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Group:
    """What the seeds of one arm have in common, at the end of training.

    Attributes:
        arm: With the first seed.
        seeds: How many.
        curve: By evaluation, tasks trained and the mean value over the tasks trained so far.
        tasks: Value of each task.
        average: Mean value over the tasks.
        forgetting: Mean over the tasks of how much worse they are than they once were; None after one evaluation.
        seconds: Training time.
        buffer_mib: Memory of the stored rows of all ranks.
    """

    arm: Arm
    seeds: int
    curve: dict[int, Spread]
    tasks: list[Spread]
    average: Spread
    forgetting: Spread | None
    seconds: Spread
    buffer_mib: float


def group(rows: Iterable[Row], metric: Metric, table: str = "buffers") -> list[Group]:
    """Put the seeds together; in the order of `METHODS`, then of buffers, representatives and candidates."""
    runs: dict[Arm, dict[int, list[Row]]] = {}
    for line in rows:
        if line["table"] == table:
            arm = Arm(**{name: line[name] for name in Arm.__dataclass_fields__} | {"seed": 0})
            runs.setdefault(arm, {}).setdefault(line["seed"], []).append(line)
    return [_group(arm, list(runs[arm].values()), metric) for arm in sorted(runs, key=_order)]


def find(groups: Sequence[Group], method: str, buffer_percent: float = 0.0) -> Group:
    """The group of a method and a buffer.

    Raises:
        KeyError: It was not trained.
    """
    for one in groups:
        if (one.arm.method, one.arm.buffer_percent) == (method, buffer_percent):
            return one
    raise KeyError(f"the study has no arm '{method}' with a buffer of {buffer_percent:g} %")


def cells(groups: Iterable[Group], *, tasks: bool, digits: int = 3) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table; with a column a task where `tasks` is true."""
    chosen = list(groups)
    numbers = [f"task {number}" for number in range(1, len(chosen[0].tasks) + 1)] if tasks else []
    draws = ["r", "c"] if chosen[0].arm.table == "rows" else []
    heads = ["method", "buffer", *draws, "average", *numbers, "forgetting", "s", "MiB"]
    return heads, [_line(one, tasks, digits) for one in chosen]


def print_table(title: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table on the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def _line(one: Group, tasks: bool, digits: int) -> list[str]:
    values = [value.text(digits) for value in one.tasks] if tasks else []
    forgetting = "" if one.forgetting is None else one.forgetting.text(digits)
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
        seconds=Spread.of([run[-1]["seconds"] for run in runs]),
        buffer_mib=float(np.mean([run[-1]["buffer_mib"] for run in runs])),
    )


def _values(line: Row, metric: Metric) -> list[float]:
    """The metric's value for task 1, 2 and so on."""
    names = sorted((name for name in line if re.fullmatch(rf"{metric.name}_task_\d+", name)), key=_number)
    return [float(line[name]) for name in names]


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _forgetting(values: NDArray[np.float64], trained: Sequence[int], metric: Metric) -> float | None:
    """How far each task fell, on average, from its best value after its own training to its last.

    Args:
        values: `[evaluations, tasks]` float64.
        trained: Tasks trained at each evaluation.
        metric: Says which way is better.
    """
    better = values if metric.higher_is_better else -values
    lost = []
    for task in range(better.shape[1]):
        earlier = [better[i, task] for i, count in enumerate(trained[:-1]) if count > task]
        if earlier:
            lost.append(max(earlier) - better[-1, task])
    return float(np.mean(lost)) if lost else None
