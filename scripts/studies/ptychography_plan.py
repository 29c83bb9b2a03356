"""Plan of the ptychography study: its sizes, its arms, and the knobs of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scripts.studies.arms import BUFFERS, DER, DERPP, ER, INCREMENTAL, METHODS, SCRATCH, Arm, Row, arm_grid
from scripts.studies.knobs import CHOOSE, Choices, Knobs, knobs_of_row, knobs_to_try
from scripts.studies.results import Group, Metric, find_group, group_seeds
from scripts.studies.scan_stream import DRIFTS, Plan, conditions

__all__ = [
    "COMMON",
    "KNOBS",
    "METRICS",
    "SIZES",
    "Course",
    "Size",
    "chosen",
    "of_drift",
    "reduction_of",
    "summarise",
]


@dataclass(frozen=True)
class Course:
    """Settings that all arms have in common.

    Attributes:
        tasks: Tasks of a drift.
        steps: Optimizer steps a task.
        batch: New samples a step and rank.
        start_task: Tasks that are only collected from before anything is replayed.
        scans: Objects a task and rank that are held out.
    """

    tasks: int
    steps: int
    batch: int
    start_task: int
    scans: int

    def capacity(self, arm: Arm) -> int:
        """Rows of a rank's buffer: a share of the samples that come to this rank."""
        return max(1, round(self.tasks * self.steps * self.batch * arm.buffer_percent / 100))

    def plan(self, drift: str, seed: int, rank: int) -> Plan:
        """The samples of a rank."""
        return Plan(tuple(conditions(drift, self.tasks)), self.steps, self.batch, seed, rank)


METRICS = (
    Metric("amplitude_error", "amplitude error", higher_is_better=False),
    Metric("phase_error", "phase error (rad)", higher_is_better=False),
)
COMMON = 10.0
"""The size of the buffer that every drift is tried with, in percent of the samples."""

KNOBS = {
    SCRATCH: Knobs(lr=1e-3),
    INCREMENTAL: Knobs(lr=1e-3),
    ER: Knobs(lr=1e-3, loss_weight=2.0),
    DER: Knobs(lr=1e-3, alpha=10.0),
    DERPP: Knobs(lr=1e-3, alpha=0.8, beta=2.0),
}
"""Best knobs in `--size choose`. The learning rate is common to all; twice that makes the upper bound 2 % better."""

CHOICES: dict[str, Choices] = {
    SCRATCH: {"lr": (5e-4, 1e-3, 2e-3)},
    ER: {"lr": (1e-3,), "loss_weight": (1.0, 2.0)},
    DER: {"lr": (1e-3,), "alpha": (0.8, 3.0, 10.0)},
    DERPP: {"lr": (1e-3,), "alpha": (0.8, 3.0), "beta": (1.0, 2.0)},
}
"""Tried on the drift of photons, with a seed that the study does not report."""


@dataclass(frozen=True)
class Size:
    """A size of the study.

    Attributes:
        course: Tasks, steps and samples.
        representatives: Replayed samples a step and rank, r.
        candidates: Samples a step and rank that are offered to the buffer, c.
        seeds: Of every arm.
        buffers: By drift, percent of the samples; each holds `COMMON`.
        draws: Pairs of r and c, tried with er, the common buffer, the first seed and the drift of photons.
        methods: Of training.
    """

    course: Course
    representatives: int = 16
    candidates: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    buffers: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {"defocus": BUFFERS, "photons": (COMMON,), "texture": (COMMON,)}
    )

    draws: tuple[tuple[int, int], ...] = ()
    methods: tuple[str, ...] = METHODS

    @property
    def rows_a_step(self) -> int:
        """Samples that a step and rank of the methods with a buffer takes, and so that of the upper bound."""
        return self.course.batch + self.representatives

    def jobs(self) -> list[tuple[str, Arm, Knobs]]:
        """Every arm of the study, drift by drift."""
        draws = [("photons", Arm(ER, COMMON, self.seeds[0], r, c, table="rows")) for r, c in self.draws]
        return [(drift, arm, KNOBS[arm.method]) for drift, arm in [*self._arms(), *draws]]

    def choices(self) -> list[tuple[str, Arm, Knobs]]:
        """Every arm that has a choice, with each of its knobs."""
        return [
            (drift, arm, knobs)
            for drift, arm in self._arms()
            if arm.method in CHOICES
            for knobs in knobs_to_try(CHOICES[arm.method])
        ]

    def _arms(self) -> list[tuple[str, Arm]]:
        return [
            (drift, replace(arm, candidates=self.candidates if arm.buffer_percent else None))
            for drift in self.buffers
            for arm in arm_grid(self.buffers[drift], self.seeds, self.representatives)
            if arm.method in self.methods
        ]


ONE_BUFFER = dict.fromkeys(DRIFTS, (COMMON,))
FULL = Course(tasks=6, steps=80, batch=16, start_task=1, scans=1)
SIZES = {
    "smoke": Size(replace(FULL, tasks=3, steps=3), seeds=(0,), buffers=ONE_BUFFER, draws=((8, 4),)),
    "small": Size(
        FULL, seeds=(0,), buffers={"defocus": (COMMON,), "photons": (COMMON,)}, methods=(SCRATCH, INCREMENTAL, ER)
    ),
    "full": Size(FULL, draws=((4, 8), (8, 8), (16, 8), (32, 8), (16, 2), (16, 16))),
    CHOOSE: Size(FULL, seeds=(100,), buffers={"photons": (COMMON,)}),
}


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the forgetting of incremental training that er with the common buffer takes away.

    For each metric and drift, and for each metric the least over the drifts; beside it how much is forgotten. What
    was not learnt, `learnt_phase_photons` being 0, or not forgotten has no share: there is nothing to take away.
    """
    summary: dict[str, float] = {}
    for metric in METRICS:
        name, reductions = metric.name.removesuffix("_error"), {}
        for drift in dict.fromkeys(line["drift"] for line in rows):
            groups = group_seeds(of_drift(rows, drift), metric)
            incremental, er = (find_group(groups, *arm) for arm in ((INCREMENTAL, 0.0), (ER, COMMON)))
            lost, kept = _forgetting(incremental), _forgetting(er)
            if incremental.learnt and lost > 0:
                reductions[f"{reduction_of(metric)}_{drift}"] = 1 - kept / lost
            summary |= {f"forgetting_{name}_{drift}_incremental": lost, f"forgetting_{name}_{drift}_er": kept}
            summary[f"learnt_{name}_{drift}"] = float(incremental.learnt)
        if reductions:
            summary |= {reduction_of(metric): min(reductions.values()), **reductions}
    return summary


def reduction_of(metric: Metric) -> str:
    """What the summary calls the least share of the forgetting that er takes away; left out where there is none."""
    return f"forgetting_reduction_{metric.name.removesuffix('_error')}"


def chosen(rows: Sequence[Row]) -> list[tuple[str, Knobs, float]]:
    """Method, knobs, and the error summed over metrics; the best knobs of a method first."""
    lines: dict[tuple[str, Knobs], list[Row]] = {}
    for line in rows:
        lines.setdefault((line["method"], knobs_of_row(line)), []).append(line)
    tried = [(method, knobs, _error(ours)) for (method, knobs), ours in lines.items()]
    return sorted(tried, key=lambda one: (METHODS.index(one[0]), one[2]))


def _forgetting(one: Group) -> float:
    assert one.forgetting is not None  # there were several evaluations
    return one.forgetting.mean


def _error(rows: Sequence[Row]) -> float:
    return sum(float(np.mean([one.average.mean for one in group_seeds(rows, metric)])) for metric in METRICS)


def of_drift(rows: Sequence[Row], drift: str) -> list[Row]:
    """The rows of one drift."""
    return [line for line in rows if line["drift"] == drift]
