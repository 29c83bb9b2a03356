"""What ranks tell each other of losses, and when the guard hears of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.header import Headers, Notes, compose
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.errors import ForgettingError
from rehearsal_plugin.runtime.loss_consensus import NOT_FINITE, LossConsensus
from rehearsal_plugin.runtime.partition_losses import FIXED_POINT
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

SECTION: dict[str, Any] = {"losses_every": 1, "guard": {"window": 1, "bound": 1.5, "action": "stop"}}
RATIO = ReplayRatio(RehearsalConfig())
NO_PAIRS = np.empty((0, 2), dtype=np.int64)


def consensus() -> LossConsensus:
    return LossConsensus(RehearsalConfig.load(SECTION), 0)


def notes_of(*ranks: LossConsensus) -> IntArray:
    """What the headers of ranks leave behind."""
    return Headers(np.stack([compose(0, 0, Request(0), 0, 0, rank.notes, NO_PAIRS, 1) for rank in ranks]), 1).notes


def best(rank: LossConsensus) -> float | None:
    assert rank.guard is not None
    lowest: float | None = rank.guard.state_dict()["best"]
    return lowest


def test_the_guard_hears_the_mean_over_the_rows_of_all_ranks() -> None:
    first, second = consensus(), consensus()
    first.report(6.0, 2.0)
    second.report(1.0, 5.0)
    first.hear(notes_of(first, second), 1, RATIO)
    assert best(first) == pytest.approx(1.0)


def test_the_guard_hears_nothing_before_all_ranks_have_measured() -> None:
    first, second = consensus(), consensus()
    first.report(6.0, 2.0)
    first.hear(notes_of(first, second), 1, RATIO)
    assert best(first) is None


def test_a_measurement_is_heard_once() -> None:
    rank = consensus()
    rank.report(1.0, 1.0)
    rank.hear(notes_of(rank), 1, RATIO)
    rank.report(9.0, 1.0)
    heard = notes_of(rank)
    with pytest.raises(ForgettingError):
        rank.hear(heard, 2, RATIO)
    rank.hear(heard, 3, RATIO)


@pytest.mark.parametrize("total", [float("nan"), float("inf"), 1e13])
def test_a_loss_that_cannot_be_told_weighs_nothing(total: float) -> None:
    first, second = consensus(), consensus()
    first.report(total, 4.0)
    second.report(6.0, 2.0)
    assert first.notes == Notes(loss_weight=NOT_FINITE, losses_measured=1)
    second.hear(notes_of(first, second), 1, RATIO)
    assert best(second) == pytest.approx(3.0)


def test_losses_travel_in_fixed_point() -> None:
    rank = consensus()
    rank.report(0.5, 3.0)
    assert rank.notes == Notes(loss_sum=FIXED_POINT // 2, loss_weight=3 * FIXED_POINT, losses_measured=1)


def test_it_goes_on_from_its_state() -> None:
    rank, loaded = consensus(), consensus()
    rank.report(1.0, 1.0)
    rank.hear(notes_of(rank), 1, RATIO)
    loaded.load_state_dict(rank.state_dict())
    assert loaded.state_dict() == rank.state_dict()
    loaded.hear(notes_of(rank), 2, RATIO)
    assert best(loaded) == 1.0


def test_without_a_guard_nobody_listens() -> None:
    rank = LossConsensus(RehearsalConfig(), 0)
    rank.report(1.0, 1.0)
    rank.hear(notes_of(rank), 1, RATIO)
    assert rank.state_dict() == {"words": [FIXED_POINT, FIXED_POINT, 1], "heard": 0, "guard": None}


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_a_job_whose_losses_stay_nan_for_a_whole_window_ends(window: int) -> None:
    section = {"losses_every": 1, "guard": {"window": window, "action": "stop"}}
    first, second = (LossConsensus(RehearsalConfig.load(section), rank) for rank in range(2))

    def measure(loss: float, step: int) -> None:
        first.report(loss, 1.0)
        second.report(0.0, 0.0)  # nothing was replayed there
        first.hear(notes_of(first, second), step, RATIO)

    for step in range(window - 1):
        measure(float("nan"), step)
    measure(1.0, window)  # it was a passing one
    for step in range(window - 1):
        measure(float("inf"), window + step)
    for late in range(2):  # a loop that goes on after the error is told again
        with pytest.raises(ForgettingError, match=r"NaN or infinite in each of the last \d+ measurements, up to"):
            measure(float("nan"), 3 * window + late)


def test_steps_without_replayed_rows_between_them_do_not_hide_nans() -> None:
    section = {"losses_every": 1, "guard": {"window": 3, "action": "stop"}}
    rank = LossConsensus(RehearsalConfig.load(section), 0)
    for step, loss in enumerate((float("nan"), None, float("inf"), None)):
        rank.report(0.0 if loss is None else loss, 0.0 if loss is None else 1.0)
        rank.hear(notes_of(rank), step, RATIO)
    rank.report(float("nan"), 1.0)
    with pytest.raises(ForgettingError, match="last 3 measurements"):
        rank.hear(notes_of(rank), 4, RATIO)


def test_nans_are_counted_on_from_a_checkpoint() -> None:
    section = {"losses_every": 1, "guard": {"window": 3, "action": "stop"}}
    first, second = (LossConsensus(RehearsalConfig.load(section), 0) for _ in range(2))
    for step in range(2):
        first.report(float("nan"), 1.0)
        first.hear(notes_of(first), step, RATIO)
    second.load_state_dict(first.state_dict())
    second.report(float("nan"), 1.0)
    with pytest.raises(ForgettingError, match="last 3 measurements"):
        second.hear(notes_of(second), 2, RATIO)


def test_other_actions_warn_once_of_a_loss_that_stays_nan(caplog: pytest.LogCaptureFixture) -> None:
    rank = LossConsensus(RehearsalConfig.load({"losses_every": 1, "guard": {"window": 3}}), 0)
    for step in range(12):
        rank.report(float("nan"), 1.0)
        rank.hear(notes_of(rank), step, RATIO)
    assert [("last 3 measurements" in line) for line in caplog.messages] == [True]


def test_steps_without_replayed_rows_are_no_nan() -> None:
    rank = consensus()
    for step in range(10):
        rank.report(0.0, 0.0)
        rank.hear(notes_of(rank), step, RATIO)


def test_a_rank_with_finite_losses_speaks_for_all() -> None:
    first, second = consensus(), consensus()
    for step in range(10):
        first.report(2.0, 1.0)
        second.report(float("nan"), 1.0)
        first.hear(notes_of(first, second), step, RATIO)
    assert best(first) == pytest.approx(2.0)
