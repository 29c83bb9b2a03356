"""Plan of the classification study: its sizes, its arms, and the knobs of each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.studies.arms import BUFFERS, DER, DERPP, ER, INCREMENTAL, METHODS, SCRATCH, Arm, Row, arm_grid
from scripts.studies.knobs import CHOOSE, Choices, Knobs, knobs_of_row, knobs_to_try
from scripts.studies.results import Metric, group_seeds

__all__ = ["ACCURACY", "KNOBS", "SIZES", "Size", "chosen"]

ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True)

KNOBS = {
    SCRATCH: Knobs(lr=0.05),
    INCREMENTAL: Knobs(lr=0.05),
    ER: Knobs(lr=0.05, loss_weight=4.0),
    DER: Knobs(lr=0.05, alpha=1.0),
    DERPP: Knobs(lr=0.05, alpha=0.3, beta=1.0),
}
"""Best knobs in `--size choose`, averaged over both sizes of the buffer there."""

CHOICES: dict[str, Choices] = {
    SCRATCH: {"lr": (0.02, 0.05, 0.1)},
    ER: {"lr": (0.05,), "loss_weight": (1.0, 2.0, 4.0)},
    DER: {"lr": (0.05,), "alpha": (0.3, 1.0, 3.0)},
    DERPP: {"lr": (0.05,), "alpha": (0.1, 0.3), "beta": (1.0, 2.0, 4.0)},
}
"""Tried on held-out training images. All methods take the learning rate of training from scratch."""


@dataclass(frozen=True)
class Size:
    """A size of the study.

    Attributes:
        steps: Optimizer steps a task.
        batch: New images a step and rank, b.
        representatives: Replayed images a step and rank, r.
        buffers: Percent of the training images.
        seeds: Of every arm.
        draws: Pairs of r and c (None for all), tried with er, a buffer of 10 % and the first seed.
        pairs: Pairs of timed segments.
        test_images: On how many of them accuracy is measured.
    """

    steps: int = 188  # times 2 ranks times 32 images: every image once
    batch: int = 32
    representatives: int = 32
    buffers: tuple[float, ...] = BUFFERS
    seeds: tuple[int, ...] = (0, 1, 2)
    draws: tuple[tuple[int, int | None], ...] = ((8, None), (16, None), (32, None), (64, None), (32, 4), (32, 16))
    pairs: int = 20
    test_images: int = 10_000

    def jobs(self) -> list[tuple[Arm, Knobs]]:
        """Every arm of the study."""
        arms = arm_grid(self.buffers, self.seeds, self.representatives)
        arms += [Arm(ER, 10.0, self.seeds[0], r, c, table="rows") for r, c in self.draws]
        return [(arm, KNOBS[arm.method]) for arm in arms]

    def choices(self) -> list[tuple[Arm, Knobs]]:
        """Every arm that has a choice, with each of its knobs."""
        arms = [arm for arm in arm_grid(self.buffers, self.seeds, self.representatives) if arm.method in CHOICES]
        return [(arm, knobs) for arm in arms for knobs in knobs_to_try(CHOICES[arm.method])]


SIZES = {
    "smoke": Size(2, 8, 8, buffers=(2.5, 30.0), seeds=(0,), draws=((4, 2),), pairs=1, test_images=200),
    "small": Size(94, buffers=(2.5, 30.0), seeds=(0,), draws=((8, None), (32, 4)), pairs=6, test_images=2_000),
    "full": Size(),
    CHOOSE: Size(buffers=(2.5, 30.0), seeds=(100,), pairs=0),
}


def chosen(rows: Sequence[Row]) -> list[tuple[str, Knobs, float]]:
    """Method, knobs, and accuracy averaged over the buffers tried; the best knobs of a method first."""
    accuracies: dict[tuple[str, Knobs], list[float]] = {}
    for knobs in {knobs_of_row(line) for line in rows}:
        for one in group_seeds([line for line in rows if knobs_of_row(line) == knobs], ACCURACY):
            accuracies.setdefault((one.arm.method, knobs), []).append(one.average.mean)
    tried = [(method, knobs, float(np.mean(values))) for (method, knobs), values in accuracies.items()]
    return sorted(tried, key=lambda one: (METHODS.index(one[0]), -one[2]))
