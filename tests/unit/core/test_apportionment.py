"""Fair integer shares."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal_plugin.core.apportionment import fair_level, fair_shares
from rehearsal_plugin.core.arrays import IntArray

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
LIMITS = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(lambda limits: np.array(limits, dtype=np.int64))


@PROPERTY
@given(LIMITS, st.data())
def test_level_is_the_highest_that_fits(limits: IntArray, data: st.DataObject) -> None:
    if not limits.any():
        limits[0] = 1
    total = data.draw(st.integers(0, int(limits.sum()) - 1))
    fitting = [level for level in range(50) if np.minimum(limits, level).sum() <= total]
    assert fair_level(limits, total) == max(fitting)


@PROPERTY
@given(LIMITS, st.integers(0, 600))
def test_shares_add_up_to_the_total_or_to_all_there_is(limits: IntArray, total: int) -> None:
    assert fair_shares(limits, total).sum() == min(total, limits.sum())


@PROPERTY
@given(LIMITS, st.integers(0, 600))
def test_no_share_is_above_its_limit(limits: IntArray, total: int) -> None:
    assert (fair_shares(limits, total) <= limits).all()


@PROPERTY
@given(LIMITS, st.integers(0, 600))
def test_who_gets_less_than_another_by_two_is_at_its_limit(limits: IntArray, total: int) -> None:
    shares = fair_shares(limits, total)
    short = shares < shares.max() - 1
    assert (shares[short] == limits[short]).all()


def test_odd_ones_go_to_the_first_that_have_room() -> None:
    assert fair_shares(np.array([1, 9, 9, 9]), 9).tolist() == [1, 3, 3, 2]


def test_limits_are_left_as_they_were() -> None:
    limits = np.array([3, 5])
    fair_shares(limits, 100)[0] = 77
    assert limits.tolist() == [3, 5]


def test_nobody_shares_nothing() -> None:
    assert fair_shares(np.empty(0, dtype=np.int64), 5).tolist() == []


def test_a_million_million_rows_do_not_overflow() -> None:
    shares = fair_shares(np.full(10_000, 10**12, dtype=np.int64), 10**13 + 1)
    assert (shares.min(), shares.max(), shares.sum()) == (10**9, 10**9 + 1, 10**13 + 1)
