"""The level of each partition, the reference that it is compared with, and the rise."""

from __future__ import annotations

import numpy as np
import pytest

from rehearsal_plugin.runtime.forgetting_meter import NEW_FOR, ForgettingMeter
from rehearsal_plugin.runtime.partition_losses import Tally

WINDOW = 64


def hear(meter: ForgettingMeter, loss: float, rows: int = 8, new_rows: int = 0, key: int = 0) -> None:
    meter.hear({key: Tally.measured(loss * rows, rows, rows, new_rows)})


def heard(losses: list[float], new_rows: int = 0) -> ForgettingMeter:
    meter = ForgettingMeter(WINDOW)
    for loss in losses:
        hear(meter, loss, new_rows=new_rows)
    return meter


def test_the_reference_is_the_mean_of_the_first_half_window() -> None:
    meter = heard([1.0, 3.0, 1.0])
    assert meter.worst is None
    assert meter.awaits_reference
    hear(meter, 3.0)
    assert meter.rises == {0: 0.0}
    assert not meter.awaits_reference


def test_the_rise_is_that_of_the_mean_over_a_window() -> None:
    meter = heard([2.0] * 8)
    for _ in range(200):
        hear(meter, 2.2)
    assert meter.worst == pytest.approx(0.1, abs=1e-4)


def test_rows_move_the_level_by_their_part_of_the_window() -> None:
    meter = heard([2.0] * 8)
    hear(meter, 3.0, rows=16)
    assert meter.worst == pytest.approx(16 / WINDOW * 0.5)


def test_the_reference_of_an_old_partition_stays_though_it_gets_better() -> None:
    meter = heard([2.0] * 4)
    for _ in range(200):
        hear(meter, 1.0)
    assert meter.worst == pytest.approx(-0.5, abs=1e-4)


def test_a_partition_that_is_still_learnt_is_compared_with_its_best() -> None:
    meter = heard([8.0] * 8, new_rows=4)
    for _ in range(200):
        hear(meter, 2.0, new_rows=4)
    hear(meter, 3.0, new_rows=4)
    assert meter.worst == pytest.approx(8 / WINDOW * 0.5, abs=1e-3)


def test_the_reference_is_held_once_no_new_rows_come() -> None:
    meter = heard([2.0] * 8, new_rows=4)
    for _ in range(NEW_FOR):
        hear(meter, 2.0)
    for _ in range(200):
        hear(meter, 1.0)  # replay makes it better than it was when the domain ended
    assert meter.worst == pytest.approx(-0.5, abs=1e-4)


def test_the_shares_of_new_rows_are_those_of_late() -> None:
    meter = ForgettingMeter(WINDOW)
    assert meter.shares_of_new == {}
    for _ in range(5):
        meter.hear({0: Tally(new_rows=6), 1: Tally(new_rows=2), 2: Tally.measured(8.0, 4, 4, 0)})
    assert meter.shares_of_new == pytest.approx({0: 0.75, 1: 0.25, 2: 0.0})
    for _ in range(5 * NEW_FOR):
        meter.hear({1: Tally(new_rows=8)})
    assert meter.shares_of_new == pytest.approx({0: 0.0, 1: 1.0, 2: 0.0}, abs=0.01)


def test_new_rows_alone_are_no_loss() -> None:
    meter = ForgettingMeter(WINDOW)
    hear(meter, 0.0, rows=0, new_rows=5, key=3)
    assert not meter.awaits_reference
    assert meter.rises == {}


def test_the_worst_partition_counts() -> None:
    meter = ForgettingMeter(WINDOW)
    for loss, key in ((2.0, 0), (3.0, 1)):
        hear(meter, loss, rows=WINDOW, key=key)
    hear(meter, 2.2, rows=WINDOW, key=0)
    hear(meter, 3.9, rows=WINDOW, key=1)
    assert meter.rises == {0: pytest.approx(0.1), 1: pytest.approx(0.3)}
    assert meter.worst == pytest.approx(0.3)


def test_the_level_is_within_its_noise() -> None:
    """The exponential mean over w rows has the variance of about 2 w of them."""
    rng, levels = np.random.default_rng(0), []
    for _ in range(200):
        meter = heard([1.0] * 8)
        for _ in range(100):
            hear(meter, 1.0 + float(rng.normal(0, 0.5 / np.sqrt(8))))
        levels.append(meter.rises[0])
    assert np.std(levels) == pytest.approx(0.5 / np.sqrt(2 * WINDOW), rel=0.2)


def test_partitions_are_bounded() -> None:
    meter = ForgettingMeter(WINDOW)
    meter.hear({key: Tally.measured(1.0, 1.0, 1, 0) for key in range(3000)})
    assert len(meter.state_dict()["levels"]) == 1024


def test_a_loaded_meter_goes_on_alike() -> None:
    meter, loaded = heard([2.0] * 8, new_rows=1), ForgettingMeter(WINDOW)
    loaded.load_state_dict(meter.state_dict())
    for one in (meter, loaded):
        hear(one, 2.7)
    assert loaded.state_dict() == meter.state_dict()


def test_a_partition_that_is_seen_no_more_does_not_count() -> None:
    """As where a fifo buffer has lost all its rows: nothing that is replayed would bring its loss down."""
    meter = heard([2.0] * 8)
    hear(meter, 4.0, rows=WINDOW)
    assert meter.worst == pytest.approx(1.0)
    for _ in range(8 * WINDOW // 8 + 1):
        hear(meter, 3.0, key=1)
    assert meter.worst == 0.0
    assert meter.worst_partition == 1
    hear(meter, 4.0, rows=1)
    assert meter.worst_partition == 0, "until a row of it is replayed again"


def test_a_mixture_goes_by_the_rise_since_the_best_level() -> None:
    meter = heard([2.0] * 8)
    hear(meter, 1.0, rows=WINDOW)
    hear(meter, 1.5, rows=WINDOW)
    assert meter.rises == {0: pytest.approx(-0.25)}
    assert meter.rises_above_best == {0: pytest.approx(0.5)}


def test_partitions_that_come_late_are_followed_where_there_are_many() -> None:
    meter = ForgettingMeter(WINDOW)
    meter.hear({key: Tally.measured(5.0, 5.0, 5, 0) for key in range(1024)})
    hear(meter, 2.0, rows=1, key=5000)
    assert 5000 in {key for key, *_ in meter.state_dict()["levels"]}
