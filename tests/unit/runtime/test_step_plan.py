"""Rows that were planned for the micro-batches of a step."""

from __future__ import annotations

from collections import deque

import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.runtime.replay_ratio import ReplayRatio
from rehearsal_plugin.runtime.step_plan import ANY_ROWS, StepPlan

RATIO = ReplayRatio(RehearsalConfig.load({"ratio": 0.25}))


def plan(owed: int = 0) -> StepPlan:
    return StepPlan(deque([(8, 3), (8, 2), (4, 2)]), RATIO.rate, owed)


def test_micro_batches_as_planned_get_their_shares() -> None:
    shares, one = [], plan(owed=2)
    assert one.requested == 9
    for rows in (8, 8, 4):
        shares.append(one.next_share(rows, RATIO))
        one.pop()
    assert shares == [3, 2, 2]
    assert (one.pop(), one.planned, one.owed) == (None, 0, 2)


def test_a_micro_batch_of_another_size_has_no_share() -> None:
    assert plan().next_share(1, RATIO) == 0
    assert plan().next_share(None, RATIO) == 3
    assert StepPlan(deque([(ANY_ROWS, 3)])).next_share(1, RATIO) == 3


def test_a_turn_is_undone() -> None:
    one = plan()
    one.put_back(one.pop())
    assert (list(one.shares), one.planned) == ([(8, 3), (8, 2), (4, 2)], 7)


@pytest.mark.parametrize(
    ("owed", "rows", "shares", "left", "spare"),
    [
        (0, 7, [3, 2, 2], 0, 0),
        (2, 7, [3, 2, 2], 0, 0),
        (0, 9, [3, 2, 2], 2, 2),
        (1, 9, [3, 2, 2], 2, 1),
        (5, 9, [3, 2, 2], 2, 0),
        (1, 6, [3, 2, 1], 0, 0),
        (0, 2, [2, 0, 0], 0, 0),
    ],
)
def test_a_plan_is_fitted_to_the_rows_that_will_come(
    owed: int, rows: int, shares: list[int], left: int, spare: int
) -> None:
    one = plan(owed)
    one.fit(rows)
    assert one.requested == rows
    assert ([share for _, share in one.shares], one.owed, one.spare) == (shares, left, spare)


def test_it_comes_back_from_its_state() -> None:
    one = plan(owed=2)
    one.pop()
    assert StepPlan.load(one.state_dict()) == one
    one.fit(20)
    assert StepPlan.load(one.state_dict()) == one
