"""The controller of the ratio: where it begins, where it ends, and what it tells."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.config import RatioBudget
from rehearsal_plugin.runtime.forgetting_budget import RATE, ForgettingBudget
from rehearsal_plugin.runtime.forgetting_meter import ForgettingMeter
from rehearsal_plugin.runtime.partition_losses import Tally
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

BUDGET = RatioBudget(budget=0.02, window=256)
SECTION = {"ratio": {"budget": 0.02}, "buffer": {"partition_by": "domain"}}
MIDDLE = math.sqrt(0.005 * 0.5)


class Job:
    """A model whose loss on old rows answers the ratio."""

    def __init__(self, budget: RatioBudget = BUDGET) -> None:
        self.budget, self.ratio = ForgettingBudget(budget, 0), ReplayRatio(RehearsalConfig.load(SECTION))
        self.meter = ForgettingMeter(budget.window)

    def hear(self, loss: float, rows: int, new_rows: int = 0) -> float:
        self.meter.hear({0: Tally.measured(loss * rows, rows, rows, new_rows)})
        self.budget.hear(self.meter, rows, self.ratio)
        self.ratio.go_by(0)
        return self.ratio.ratio


def test_the_ratio_is_the_highest_until_there_is_a_reference_then_in_the_middle() -> None:
    job = Job()
    assert job.ratio.ratio == pytest.approx(MIDDLE)
    assert job.hear(2.0, 64) == 0.5
    assert job.hear(2.0, 64) == pytest.approx(MIDDLE)


def test_a_job_that_has_nothing_old_begins_in_the_middle() -> None:
    assert Job().hear(2.0, 64, new_rows=8) == pytest.approx(MIDDLE)


def test_the_example_of_the_module() -> None:
    job, ratios = Job(), []
    for rise in (0.0, 0.01, 0.03, 0.03):
        job.budget.hear(_At(rise), 32, job.ratio)
        ratios.append(job.budget.ratio)
    assert ratios == pytest.approx([0.050, 0.073, 0.121, 0.169], abs=1e-3)


class _At(ForgettingMeter):
    """A meter that reads a rise."""

    def __init__(self, rise: float) -> None:
        super().__init__(256)
        self._rise = rise

    @property
    def worst(self) -> float:
        return self._rise


@pytest.mark.parametrize("rows", [1, 8, 64, 1000])
def test_no_measurement_moves_it_faster_than_its_rows_allow(rows: int) -> None:
    job = Job()
    job.budget.hear(_At(0.0), rows, job.ratio)
    before = job.budget.ratio
    job.budget.hear(_At(5.0), rows, job.ratio)
    assert math.log(job.budget.ratio / before) <= RATE * min(1, rows / 256) + 1e-9


def test_a_measurement_without_rows_changes_nothing() -> None:
    job = Job()
    job.budget.hear(_At(0.0), 8, job.ratio)
    before = job.budget.state_dict()
    job.budget.hear(_At(1.0), 0, job.ratio)
    assert job.budget.state_dict() == before


@pytest.mark.parametrize("rise", [0.0, 1.0])
def test_nothing_winds_up_at_a_bound(rise: float) -> None:
    """However long it was there, it leaves as soon as the loss has crossed the budget."""
    job = Job()
    for _ in range(5000):
        job.budget.hear(_At(rise), 64, job.ratio)
    at_bound = job.budget.ratio
    for _ in range(8):
        job.budget.hear(_At(0.02 + (0.04 if rise == 0 else -0.04)), 64, job.ratio)
    assert abs(math.log(job.budget.ratio / at_bound)) > 1


@pytest.mark.parametrize("lag", [30, 300])
@pytest.mark.parametrize("slope", [0.02, 0.06, 0.15])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_it_ends_at_the_budget(lag: int, slope: float, noise: float) -> None:
    """A loss that follows the ratio with a lag of some steps, and rises by `slope` for each e-fold less of replay.

    At a ratio of 0.12 the rise is what the budget allows. The noise is that of the mean over rows; the reference has
    some of it too, and that is the error that is left.
    """
    rng, job, level, rows_owed, ends = np.random.default_rng(1), Job(), 2.0, 0.0, []
    for step in range(8_000):
        rows_owed += 100 * job.ratio.ratio
        rows = int(rows_owed)
        rows_owed -= rows
        loss = level + float(rng.normal(0, noise / math.sqrt(max(1, rows))))
        if step < 13:
            job.hear(2.0 + loss - level, rows)  # before it has forgotten anything
            continue
        job.hear(loss, rows)
        wanted = 2.0 * (1.02 + slope * math.log(0.12 / job.ratio.ratio))
        level += (wanted - level) / lag
        if step > 6000:
            ends.append(level / 2.0 - 1)
    tolerance = 0.1 * 0.02 if not noise else noise / 2.0 / math.sqrt(64)
    assert float(np.mean(ends)) == pytest.approx(0.02, abs=tolerance)
    assert float(np.std(ends)) < 0.1 * 0.02 + noise / 10


def test_what_the_highest_ratio_cannot_hold_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    job = Job()
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            job.budget.hear(_At(0.1), 64, job.ratio)
    assert [record.message for record in caplog.records] == [
        "the loss on replayed rows has risen by 10 %, more than the 2 % of rehearsal.ratio.budget, with the ratio at "
        "its highest, 0.5, where a row counts for 1; give a higher rehearsal.ratio.max, or a lower learning rate"
    ]


def test_a_loaded_controller_goes_on_alike() -> None:
    job, loaded = Job(), Job()
    for rise in (0.0, 0.01, 0.05):
        job.budget.hear(_At(rise), 32, job.ratio)
    loaded.budget.load_state_dict(job.budget.state_dict())
    for one in (job, loaded):
        one.budget.hear(_At(0.03), 32, one.ratio)
    assert loaded.budget.state_dict() == job.budget.state_dict()
    assert loaded.budget.ratio == job.budget.ratio


def test_other_bounds_hold_from_the_load_on() -> None:
    job, loaded = Job(), Job(RatioBudget(budget=0.02, min=0.01, max=0.02, window=256))
    job.budget.hear(_At(0.0), 32, job.ratio)
    loaded.budget.load_state_dict(job.budget.state_dict())
    assert loaded.budget.ratio == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("by", "lowest", "begin", "highest"),
    [
        ("ratio", (0.01, 1), (0.05, 1), (0.25, 1)),
        ("loss_weight", (0.05, 1), (0.05, 2), (0.05, 4)),
        ("both", (0.01, 1), (0.025, 4), (0.25, 4)),
    ],
)
def test_the_weight_is_raised_before_the_ratio(
    by: str, lowest: tuple[float, float], begin: tuple[float, float], highest: tuple[float, float]
) -> None:
    job = Job(RatioBudget.model_validate({"budget": 0.02, "min": 0.01, "max": 0.25, "window": 256, "by": by}))
    for rise, expected in ((0.0, begin), (1.0, highest), (0.0, lowest)):
        for _ in range(1 if expected is begin else 3000):
            job.budget.hear(_At(rise), 64, job.ratio)
        assert (job.budget.ratio, job.budget.loss_weight) == pytest.approx(expected, rel=1e-3)
