"""State of what a rank knew of the others: that of a job is taken, and none that would end in a wrong draw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from rehearsal_plugin.checkpoint.account_checks import check_schedule
from rehearsal_plugin.checkpoint.census_checks import check_census
from rehearsal_plugin.distributed.header_schedule import STEADY_AFTER
from rehearsal_plugin.distributed.transport import Transport
from tests.helpers.thread_ranks import run_threads
from tests.unit.distributed.test_header_round import round_of, tell

STEPS = STEADY_AFTER + 3


def saved(transport: Transport, steps: int) -> dict[str, Any]:
    headers = round_of(transport)
    for step in range(steps):
        tell(headers, step, 8, 50)
    return headers.state_dict()


@pytest.mark.parametrize("steps", [0, 1, 5, STEPS, 4 * STEPS])
def test_the_state_of_a_job_is_taken(steps: int) -> None:
    check_census(run_threads(saved, 2, steps)[0], 2, 2, steps)


def never_again(state: dict[str, Any]) -> None:
    state["schedule"]["next"] = 1 << 50


def heard_later(state: dict[str, Any]) -> None:
    state["heard_at"] = STEPS + 1


def begun_later(state: dict[str, Any]) -> None:
    state["schedule"]["first"] = STEPS


def rate_below_zero(state: dict[str, Any]) -> None:
    state["rates"][0] = -1


def rate_that_overflows(state: dict[str, Any]) -> None:
    state["rates"][2] = 1 << 50


@pytest.mark.parametrize("forge", [never_again, heard_later, begun_later, rate_below_zero, rate_that_overflows])
def test_a_forged_schedule_is_refused(forge: Callable[[dict[str, Any]], None]) -> None:
    state = copy.deepcopy(run_threads(saved, 2, STEPS)[0])
    forge(state)
    with pytest.raises(ValueError, match=r"numbers that are not|no whole number"):
        check_census(state, 2, 2, STEPS)


@pytest.mark.parametrize("share", [float("inf"), float("nan"), -1.0, 1e300, 1])
def test_a_forged_share_of_a_group_is_refused(share: Any) -> None:
    schedule = {"numerator": 0, "denominator": 1, "rows": 0, "tokens": 0, "known": False, "boost": 1.0, "most": 0.0}
    check_schedule(schedule)
    with pytest.raises(ValueError, match="no number"):
        check_schedule({**schedule, "group_share": share})
