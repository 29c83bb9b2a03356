"""The index of a buffer against a slow model of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal_plugin.buffer.partitions import Partitions
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import IntArray

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
CAPACITY = 12
KEYS = st.sampled_from([0, 1, 2, -5, 2**40, -(2**63), 2**63 - 1])


def ints(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


def members_by_key(partitions: Partitions) -> dict[int, set[int]]:
    keys = partitions.keys.tolist()
    listed = [partitions.members(number).tolist() for number in range(len(partitions))]
    assert all(len(set(slots)) == len(slots) for slots in listed), "a slot stands twice in a partition"
    return {key: set(slots) for key, slots in zip(keys, listed, strict=True) if slots}


@st.composite
def admissions(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Batches of (keys, slots): any rows kept at any slots, new slots without gaps."""
    batches, count = [], 0
    for size in draw(st.lists(st.integers(0, 20), max_size=12)):
        keys = draw(st.lists(KEYS, min_size=size, max_size=size))
        fresh = draw(st.integers(0, min(size, CAPACITY - count)))
        old = draw(st.lists(st.integers(0, count - 1), unique=True, max_size=size - fresh)) if count else []
        slots = [*old, *range(count, count + fresh)]
        slots += [-1] * (size - len(slots))
        batches.append((keys, draw(st.permutations(slots))))
        count += fresh
    return batches


def replay(batches: list[tuple[list[int], list[int]]]) -> tuple[SlotIndex, dict[int, int], list[int]]:
    """The index after the batches; the key at each slot and all offered keys, by a dict and a list."""
    slot_index, owner, offered = SlotIndex(CAPACITY, partitioned=True), dict[int, int](), list[int]()
    assert slot_index.partitions is not None
    for keys, slots in batches:
        slot_index.record(ints(slots), slot_index.partitions.number(ints(keys)))
        owner.update({slot: key for key, slot in zip(keys, slots, strict=True) if slot >= 0})
        offered += keys
    return slot_index, owner, offered


@PROPERTY
@given(admissions())
def test_every_slot_is_listed_by_the_partition_of_its_last_row(batches: list[tuple[list[int], list[int]]]) -> None:
    slot_index, owner, _ = replay(batches)
    assert slot_index.partitions is not None
    expected = {key: {slot for slot in owner if owner[slot] == key} for key in owner.values()}
    assert members_by_key(slot_index.partitions) == expected


@PROPERTY
@given(admissions())
def test_sizes_sum_to_the_count(batches: list[tuple[list[int], list[int]]]) -> None:
    slot_index, owner, _ = replay(batches)
    assert slot_index.partitions is not None
    assert slot_index.partitions.sizes.sum() == slot_index.count == len(owner)


@PROPERTY
@given(admissions())
def test_every_offered_row_is_counted_kept_or_not(batches: list[tuple[list[int], list[int]]]) -> None:
    slot_index, _, offered = replay(batches)
    assert slot_index.partitions is not None
    seen = dict(zip(slot_index.partitions.keys.tolist(), slot_index.partitions.offered.tolist(), strict=True))
    assert seen == {key: offered.count(key) for key in offered}
    assert slot_index.offered == len(offered)


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


def test_a_partition_may_lose_all_its_rows() -> None:
    slot_index, _, _ = replay([([1, 1], [0, 1]), ([2, 2], [1, 0])])
    assert slot_index.partitions is not None
    assert dict(zip(slot_index.partitions.keys.tolist(), slot_index.partitions.sizes.tolist(), strict=True)) == {
        1: 0,
        2: 2,
    }


def test_without_partitions_rows_are_only_counted() -> None:
    slot_index = SlotIndex(CAPACITY, partitioned=False)
    slot_index.record(ints([0, -1, 1]), ints([0, 0, 0]))
    assert (slot_index.count, slot_index.offered, slot_index.partitions) == (2, 3, None)


def test_thousands_of_partitions_of_one_row_each() -> None:
    slot_index = SlotIndex(5000, partitioned=True)
    assert slot_index.partitions is not None
    keys = np.arange(5000) * 1_000_003 - 2**40
    slot_index.record(np.arange(5000), slot_index.partitions.number(keys))
    assert (slot_index.partitions.sizes == 1).all()


@pytest.mark.parametrize("seed", range(20))
def test_any_batches_of_hundreds_of_rows_leave_every_slot_with_its_last_owner(seed: int) -> None:
    """Lists of several partitions grow, shrink and move at once."""
    rng = np.random.default_rng(seed)
    slot_index, owner = SlotIndex(600, partitioned=True), np.full(600, -1)
    assert slot_index.partitions is not None
    for _ in range(30):
        size = int(rng.integers(1, 400))
        first = rng.integers(0, 40)
        keys = rng.integers(first, first + rng.integers(1, 12), size)
        fresh = min(size, 600 - slot_index.count)
        old = rng.permutation(slot_index.count)[: min(size - fresh, slot_index.count)]
        slots = np.full(size, -1)
        slots[: fresh + len(old)] = np.concatenate((np.arange(slot_index.count, slot_index.count + fresh), old))
        slots = rng.permutation(slots)  # new ones in any order
        slot_index.record(slots, slot_index.partitions.number(keys))
        owner[slots[slots >= 0]] = keys[slots >= 0]
        stored = owner[: slot_index.count]
        expected = {key: set(np.flatnonzero(stored == key).tolist()) for key in set(stored.tolist())}
        assert members_by_key(slot_index.partitions) == expected


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
