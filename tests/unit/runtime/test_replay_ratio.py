"""How many rows to replay."""

from __future__ import annotations

import random
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.distributed.request import requests_after
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio

STEPS = 1000
RATIOS = [0.0, 1e-9, 0.001, 0.05, 0.1, 0.125, 0.3, 1 / 3, 0.5, 0.7, 0.875, 0.99]
Mode = Literal["append", "replace"]


def per_row(ratio: float, mode: Mode) -> Fraction:
    """Replayed rows for one row of the batch, as the decimal number that the user wrote."""
    share = Fraction(repr(ratio))
    return share if mode == "replace" else share / (1 - share)


def furthest_from_exact(ratio: float, mode: Mode, sizes: Iterable[int]) -> Fraction:
    """The largest distance between rows replayed and rows due, over all steps."""
    schedule, due, replayed, furthest = (
        ReplayRatio(RehearsalConfig(ratio=ratio, mode=mode)),
        Fraction(0),
        0,
        Fraction(0),
    )
    for size in sizes:
        due += per_row(ratio, mode) * size
        replayed += schedule.rows_for(size)
        furthest = max(furthest, abs(due - replayed))
    return furthest


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("size", [1, 3, 7, 8, 64])
@pytest.mark.parametrize("ratio", RATIOS)
def test_sum_is_never_a_whole_row_off_with_equal_batches(ratio: float, size: int, mode: Mode) -> None:
    assert furthest_from_exact(ratio, mode, [size] * STEPS) < 1


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_sum_is_never_a_whole_row_off_with_batches_of_any_size(ratio: float, mode: Mode) -> None:
    sizes = random.Random(0)
    assert furthest_from_exact(ratio, mode, (sizes.randrange(0, 100) for _ in range(STEPS))) < 1


def test_no_drift_over_a_hundred_thousand_steps() -> None:
    schedule = ReplayRatio(RehearsalConfig(ratio=0.1, mode="replace"))
    assert sum(schedule.rows_for(1) for _ in range(100_000)) == 10_000


def test_ratio_is_the_share_of_what_the_model_sees() -> None:
    schedule = ReplayRatio(RehearsalConfig(ratio=0.2, mode="append"))
    assert [schedule.rows_for(8) for _ in range(10)] == [2] * 10


def test_replaced_rows_are_a_share_of_the_batch() -> None:
    schedule = ReplayRatio(RehearsalConfig(ratio=0.125, mode="replace"))
    assert [schedule.rows_for(8) for _ in range(10)] == [1] * 10


@pytest.mark.parametrize("ratio", RATIOS)
def test_no_batch_is_replaced_more_than_whole(ratio: float) -> None:
    schedule, sizes = ReplayRatio(RehearsalConfig(ratio=ratio, mode="replace")), random.Random(1)
    assert all(schedule.rows_for(size) <= size for size in (sizes.randrange(1, 5) for _ in range(STEPS)))


def test_representatives_are_the_same_at_every_step() -> None:
    schedule = ReplayRatio(RehearsalConfig(representatives=7))
    assert [schedule.rows_for(size) for size in (1, 8, 0, 100)] == [7, 7, 7, 7]


def test_an_empty_batch_is_due_no_rows() -> None:
    schedule = ReplayRatio(RehearsalConfig(ratio=0.5))
    assert schedule.rows_for(0) == 0


def test_all_ranks_agree() -> None:
    sizes = [random.Random(2).randrange(1, 50) for _ in range(STEPS)]
    ranks = [ReplayRatio(RehearsalConfig(ratio=0.3)) for _ in range(4)]
    assert len({tuple(map(schedule.rows_for, sizes)) for schedule in ranks}) == 1


def change(to: float, steps: int, **keys: Any) -> ReplayRatio:
    return ReplayRatio(RehearsalConfig.load({"ratio_schedule": {"to": to, "steps": steps}, "mode": "replace", **keys}))


@pytest.mark.parametrize(("first", "to"), [(0.05, 0.25), (0.5, 0.1), (0.0, 1 / 3)])
def test_a_ratio_changes_in_equal_steps_and_then_stays(first: float, to: float) -> None:
    schedule = change(to, 100, ratio=first, start_step=20)
    ratios = []
    for step in (0, 20, 45, 70, 120, 10_000):
        schedule.go_by(step)
        ratios.append(schedule.ratio)
    assert ratios == pytest.approx([first, first, 0.75 * first + 0.25 * to, 0.5 * (first + to), to, to])


def test_a_changing_ratio_is_met_over_time() -> None:
    schedule, replayed = change(0.4, 1000, ratio=0.1), 0
    for step in range(1000):
        schedule.go_by(step)
        replayed += schedule.rows_for(7)
    assert replayed == pytest.approx(7 * sum(0.1 + 0.3 * step / 1000 for step in range(1000)), abs=1)


def test_the_carried_fraction_of_a_changing_ratio_stays_a_small_one() -> None:
    schedule = change(0.37, 3000, ratio=0.1)
    for step in range(3000):
        schedule.go_by(step)
        schedule.rows_for(7)
        assert schedule.state_dict()["denominator"].bit_length() < 96


def test_a_ratio_can_be_raised_up_to_a_bound() -> None:
    schedule = ReplayRatio(RehearsalConfig(ratio=0.1))
    ratios = []
    for step in range(4):
        schedule.boost(2.0, 0.5)
        schedule.go_by(step)
        ratios.append(schedule.ratio)
    assert ratios == pytest.approx([0.2, 0.4, 0.5, 0.5])


def test_a_bound_below_the_ratio_lowers_nothing() -> None:
    schedule = ReplayRatio(RehearsalConfig(ratio=0.5))
    schedule.boost(2.0, 0.3)
    schedule.go_by(1)
    assert schedule.ratio == 0.5


def test_what_was_learnt_is_kept() -> None:
    first, second = change(0.4, 10, ratio=0.1), change(0.4, 10, ratio=0.1)
    first.go_by(3)
    first.boost(1.5, 0.9)
    first.rows_for(8)
    second.load_state_dict(first.state_dict())
    for schedule in (first, second):
        schedule.go_by(5)
    assert [first.rows_for(n) for n in range(20)] == [second.rows_for(n) for n in range(20)]


@pytest.mark.parametrize("factor", [1.0, 0.7311111111])
@pytest.mark.parametrize("keys", [{"ratio": 0.3}, {"ratio": 0.123456789}, {"representatives": 5}])
def test_a_rate_with_large_terms_is_told_too(keys: dict[str, Any], factor: float) -> None:
    """As after a group held less than others for a while."""
    schedule = ReplayRatio(RehearsalConfig(**keys))
    schedule.share_among_groups(1.2345678)
    for _ in range(10):
        schedule.rows_for(8)
    schedule.share_among_groups(factor)
    rate = np.array(schedule.rate_of_step([8]))[:, None]
    assert rate[1] > 0
    told = [int(requests_after(rate, n)[0]) for n in range(1, 65)]
    assert abs(sum(told) - sum(schedule.rows_for(8) for _ in told)) <= 1
