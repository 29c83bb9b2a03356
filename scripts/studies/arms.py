"""Arms of a study: one way of training each, and the rows of the report that it leaves.

An arm is a method, a size of the buffer and a seed. Its result is a row of the report for each evaluation, with a value
for every task and metric::

    {"table": "buffers", "method": "er", "buffer_percent": 5.0, "seed": 0, "representatives": 32, "candidates": null,
     "after_task": 3, "accuracy_task_1": 0.91, ..., "accuracy_constant_task_1": 0.5, ..., "seconds": 21.3,
     "buffer_mib": 2.4}

A constant is the best answer that does not look at its input: who is no better has learnt nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

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
    "Row",
    "arm_grid",
    "evaluation_row",
]

SCRATCH, INCREMENTAL, ER, DER, DERPP = METHODS = ("from scratch", "incremental", "er", "der", "der++")
REPLAYING = (ER, DER, DERPP)
BUFFERS = (2.5, 5.0, 10.0, 20.0, 30.0)
"""Rows of all ranks' buffers together, in percent of the training data."""

Row: TypeAlias = dict[str, Any]


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


def arm_grid(buffers: Iterable[float], seeds: Iterable[int], representatives: int) -> list[Arm]:
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


def evaluation_row(
    arm: Arm,
    after_task: int,
    values: Mapping[str, Sequence[float]],
    *,
    seconds: float,
    buffer_mib: float,
    constants: Mapping[str, Sequence[float]] | None = None,
    **more: Any,
) -> Row:
    """One evaluation as a line of the report.

    Args:
        arm: The arm that was evaluated.
        after_task: Tasks trained so far.
        values: By name of the metric, a value for each task.
        seconds: Training time so far, without evaluations.
        buffer_mib: Memory of the stored rows of all ranks.
        constants: The same values of the best constant answer.
        more: Further columns of the study.
    """
    columns = {**values, **{f"{name}_constant": line for name, line in (constants or {}).items()}}
    tasks = {f"{name}_task_{task}": value for name, line in columns.items() for task, value in enumerate(line, 1)}
    return {**asdict(arm), "after_task": after_task, **tasks, "seconds": seconds, "buffer_mib": buffer_mib, **more}
