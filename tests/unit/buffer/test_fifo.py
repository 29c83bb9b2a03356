"""The newest rows stay."""

from __future__ import annotations

import pytest

from tests.helpers.policy_runs import BATCHINGS, Simulation


@pytest.mark.parametrize("sizes", BATCHINGS.values(), ids=list(BATCHINGS))
def test_fifo_keeps_the_newest(sizes: list[int]) -> None:
    assert Simulation("fifo", 3).run([[0] * size for size in sizes]).kept() == {3, 4, 5}


def test_fifo_goes_on_where_it_was_after_a_batch_larger_than_the_buffer() -> None:
    assert Simulation("fifo", 3).run([[0] * 7, [0], [0]]).kept() == {6, 7, 8}
