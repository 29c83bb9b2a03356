"""Lists of slots by partition: without gaps, in little memory, and with few moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rehearsal_plugin.buffer.partitions import Partitions, count_earlier
from rehearsal_plugin.core.arrays import IntArray

CAPACITY = 12


def ints(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


def filled(keys: list[int], capacity: int = CAPACITY) -> Partitions:
    """Partitions of rows by key, one slot after the other."""
    partitions = Partitions(capacity)
    partitions.record(np.arange(len(keys)), partitions.number(ints(keys)), np.zeros(len(keys), dtype=bool))
    return partitions


def hand_over(partitions: Partitions, slots: list[int], key: int) -> None:
    partitions.record(ints(slots), partitions.number(np.full(len(slots), key)), np.ones(len(slots), dtype=bool))


def test_partitions_are_numbered_for_good() -> None:
    partitions = Partitions(CAPACITY)
    first = partitions.number(ints([7, 3, 7]))
    partitions.number(ints([1, 2, 3]))
    assert (partitions.number(ints([7, 3, 7])) == first).all()


def test_numbers_point_at_their_keys() -> None:
    partitions = Partitions(CAPACITY)
    keys = ints([5, -1, 5, 9])
    numbers = partitions.number(keys)
    assert partitions.keys[numbers].tolist() == keys.tolist()


def test_new_partitions_of_a_batch_are_numbered_in_the_order_of_their_keys() -> None:
    partitions = Partitions(CAPACITY)
    partitions.number(ints([7, 3, 7]))
    partitions.number(ints([9, 1]))
    assert partitions.keys.tolist() == [3, 7, 1, 9]


def test_the_last_slots_of_a_list_fill_its_holes() -> None:
    partitions = filled([0, 0, 0, 0, 0])
    hand_over(partitions, [0, 3], key=1)
    assert partitions.members(0).tolist() == [4, 1, 2]
    assert partitions.members(1).tolist() == [0, 3]


def test_a_slot_that_keeps_its_owner_keeps_its_place() -> None:
    partitions = filled([0, 0, 0])
    hand_over(partitions, [0, 2], key=0)
    assert partitions.members(0).tolist() == [0, 1, 2]


def test_a_slot_is_found_by_its_place_in_its_partition() -> None:
    partitions = filled([5, 8, 5, 8, 5])
    numbers, places = partitions.number(ints([5, 8, 5])), ints([2, 0, 0])
    assert partitions.slots(numbers, places).tolist() == [4, 1, 0]


def test_offers_are_counted_apart_from_rows() -> None:
    partitions = filled([5, 8, 5])
    partitions.count_offers(partitions.number(ints([8, 8, 8, 5])))
    assert (partitions.offered.tolist(), partitions.sizes.tolist()) == ([1, 3], [2, 1])


def test_rows_of_one_owner_are_counted_through_a_batch() -> None:
    assert count_earlier(ints([4, 0, 4, 4, 0])).tolist() == [0, 0, 1, 2, 1]


def test_saved_partitions_are_loaded_in_the_same_order() -> None:
    partitions = filled([5, 8, 5, 2, 8])
    hand_over(partitions, [0], key=2)
    loaded = Partitions(CAPACITY)
    loaded.load_state_dict(partitions.state_dict(), count=5)
    np.testing.assert_equal(loaded.state_dict(), partitions.state_dict())
    assert loaded.number(ints([2, 5, 8])).tolist() == partitions.number(ints([2, 5, 8])).tolist()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"members": ints([0, 2, 2])}, "share out"),
        ({"members": ints([0, 1])}, "share out"),
        ({"sizes": ints([4, -1])}, "share out"),
        ({"keys": ints([5, 5])}, "told apart"),
        ({"seen": ints([3])}, "told apart"),
    ],
    ids=["a slot twice", "a slot missing", "a negative size", "a key twice", "a count missing"],
)
def test_a_state_that_contradicts_itself_is_refused(wrong: dict[str, Any], message: str) -> None:
    state = filled([5, 8, 5]).state_dict() | wrong
    with pytest.raises(ValueError, match=message):
        Partitions(CAPACITY).load_state_dict(state, count=3)


def grown(batches: list[list[int]], capacity: int) -> tuple[Partitions, int]:
    """Partitions that rows by key were appended to, and how often their lists were laid out anew."""
    partitions, arrays, count = Partitions(capacity), set[int](), 0
    kept = []
    for keys in batches:
        slots = np.arange(count, count + len(keys))
        partitions.record(slots, partitions.number(ints(keys)), np.zeros(len(keys), dtype=bool))
        count += len(keys)
        if id(partitions._lists) not in arrays:
            kept.append(partitions._lists)  # so that no other gets its number
            arrays.add(id(partitions._lists))
    return partitions, len(arrays)


GROWING = {
    "one after the other": [[key] * 10 for key in range(10) for _ in range(100)],
    "in turn": [list(range(10)) for _ in range(1000)],
    "one": [[0] * 10 for _ in range(1000)],
}


@pytest.mark.parametrize("batches", GROWING.values(), ids=list(GROWING))
def test_lists_that_grow_row_by_row_are_laid_out_anew_a_few_times_only(batches: list[list[int]]) -> None:
    partitions, arrays = grown(batches, 10_000)
    assert partitions.sizes.sum() == 10_000
    assert arrays <= 60


@pytest.mark.parametrize("batches", GROWING.values(), ids=list(GROWING))
def test_lists_take_twice_what_they_hold_at_most(batches: list[list[int]]) -> None:
    partitions, _ = grown(batches, 10_000)
    assert len(partitions._lists) <= 2 * 10_000 + 64 * len(partitions)


def test_lists_give_back_what_they_needed_when_they_were_longer() -> None:
    """Every partition once owns all slots."""
    partitions, slots = Partitions(1000), np.arange(1000)
    for key in range(100):
        partitions.record(slots, partitions.number(np.full(1000, key)), np.full(1000, key > 0))
    assert partitions.sizes.tolist() == [0] * 99 + [1000]
    assert sorted(partitions.members(99).tolist()) == slots.tolist()
    assert len(partitions._lists) <= 2 * 1000 + 64 * 100
