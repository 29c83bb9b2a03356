"""What is owed to micro-batches of different size is kept apart."""

from __future__ import annotations

import pytest

from rehearsal_plugin.runtime.owed_by_size import FORGOTTEN_AFTER, OwedBySize


def test_sizes_that_hardly_differ_share_a_sum() -> None:
    owed = OwedBySize()
    for rows in (8, 7, 9, 12, 6):
        owed.to(rows).add((1, 1))
    assert not owed.several
    assert owed.to(8).ratio == (5, 1)


@pytest.mark.parametrize("rows", [1, 2, 5, 13, 64])
def test_other_sizes_have_sums_of_their_own(rows: int) -> None:
    owed = OwedBySize()
    owed.to(8).add((3, 1))
    assert owed.to(rows).ratio == (0, 1)
    assert owed.several


def test_a_micro_batch_without_a_row_has_no_size() -> None:
    owed = OwedBySize()
    owed.to(8)
    owed.note_micro_batch(0)
    assert not owed.several


def test_the_total_is_that_of_all_sizes() -> None:
    owed = OwedBySize()
    owed.to(1).add((1, 4))
    owed.to(64).add((16, 3))
    assert owed.total().reduced == [67, 12]


def test_a_size_that_comes_no_more_leaves_its_sum_to_the_next() -> None:
    owed = OwedBySize()
    owed.note_micro_batch(64)
    owed.to(64).add((16, 1))
    for _ in range(FORGOTTEN_AFTER):
        owed.note_micro_batch(1)
    assert owed.several
    owed.note_micro_batch(1)
    assert not owed.several
    assert owed.to(1).ratio == (16, 1)


def test_what_has_no_room_is_owed_to_the_largest() -> None:
    owed = OwedBySize()
    owed.to(1).add((2, 1))
    owed.to(64)
    assert owed.pass_on(1, 2)
    assert (owed.to(1).ratio, owed.to(64).ratio) == ((0, 1), (2, 1))
    assert not owed.pass_on(64, 2)
    assert owed.total().ratio == (0, 1)


def test_it_goes_on_from_its_state() -> None:
    owed = OwedBySize()
    for rows in (1, 1, 64, 8):
        owed.note_micro_batch(rows)
        owed.to(rows).add((rows, 4))
    loaded = OwedBySize.load(owed.state())
    for each in (owed, loaded):
        for _ in range(FORGOTTEN_AFTER - 1):
            each.note_micro_batch(8)
    assert loaded.state() == owed.state()
    assert [size for size, *_ in owed.state()] == [64, 8]


def test_one_sum_of_an_earlier_release_is_that_of_the_first_size() -> None:
    owed = OwedBySize.of_earlier_release([7, 2])
    owed.note_micro_batch(8)
    assert owed.state() == [[8, 7, 2, 0]]
