"""When there are headers: alike on all ranks, always while something changes, and seldom when nothing does."""

from __future__ import annotations

import numpy as np
import pytest

from rehearsal_plugin.distributed.header_schedule import LONGEST, STEADY_AFTER, HeaderSchedule


def headers_of(requests: list[list[int]], steps: int, most_apart: int = 1) -> list[int]:
    """The exchanges with headers of ranks that ask for these rows, step by step; the last number stays."""
    ranks, due = [HeaderSchedule(most_apart) for _ in requests], []
    for step in range(steps):
        is_due = [rank.is_due(step) for rank in ranks]
        assert len(set(is_due)) == 1, "ranks differ"
        if not is_due[0]:
            continue
        due.append(step)
        told = [each[min(step, len(each) - 1)] for each in requests]
        promises = [rank.promise(step, [word], steady=True) for rank, word in zip(ranks, told, strict=True)]
        for rank in ranks:
            rank.agree(step, np.array(promises))
    return due


def test_while_something_changes_every_exchange_has_headers() -> None:
    assert headers_of([list(range(200)), [8]], 200) == list(range(200))


def test_when_nothing_changes_headers_become_rare() -> None:
    due = headers_of([[8], [7]], 1000)
    assert due[: STEADY_AFTER + 1] == list(range(STEADY_AFTER + 1))
    gaps = np.diff(due[STEADY_AFTER:])
    assert gaps[:5].tolist() == [2, 4, 8, 16, 32]
    assert set(gaps[6:].tolist()) == {LONGEST}


def test_a_change_is_told_at_the_next_headers_and_all_follow_closely_again() -> None:
    due = headers_of([[8] * 500 + [9], [7]], 700)
    first = next(step for step in due if step >= 500)
    assert first - 500 < LONGEST
    assert due[due.index(first) :][:STEADY_AFTER] == list(range(first, first + STEADY_AFTER))


def test_a_rank_that_is_not_steady_promises_nothing() -> None:
    schedule = HeaderSchedule()
    for step in range(100):
        assert schedule.promise(step, [8], steady=False) == 0


@pytest.mark.parametrize("first", [0, 1000])
def test_headers_of_all_groups_are_apart_as_soon_as_there_were_as_many(first: int) -> None:
    schedule, due = HeaderSchedule(16), []
    for step in range(first, first + 100):
        if schedule.is_due(step):
            due.append(step - first)
            schedule.agree(step, np.array([schedule.promise(step, [step], steady=False)]))
    assert due == [0, 1, 3, 7, 15, 31, 47, 63, 79, 95]


def test_a_schedule_goes_on_from_its_state() -> None:
    schedule = HeaderSchedule()
    for step in range(STEADY_AFTER + 2):
        if schedule.is_due(step):
            schedule.agree(step, np.array([schedule.promise(step, [3, 4], steady=True)]))
    loaded = HeaderSchedule()
    loaded.load_state_dict(schedule.state_dict())
    for step in range(STEADY_AFTER + 2, STEADY_AFTER + 20):
        assert loaded.is_due(step) == schedule.is_due(step)
        if schedule.is_due(step):
            promises = [each.promise(step, [3, 4], steady=True) for each in (schedule, loaded)]
            assert promises[0] == promises[1] > 0
            for each in (schedule, loaded):
                each.agree(step, np.array(promises))
