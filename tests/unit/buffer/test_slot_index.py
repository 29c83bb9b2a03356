"""The index of a buffer, with its partitions, against a slow model of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal_plugin.buffer.partitions import Partitions
from rehearsal_plugin.buffer.slot_index import SlotIndex, kept_places
from rehearsal_plugin.core.arrays import Float32Array, IntArray

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
CAPACITY = 12
KEYS = st.sampled_from([0, 1, 2, -5, 2**40, -(2**63), 2**63 - 1])


def ints(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


def column(numbers: list[float]) -> Float32Array:
    return np.array(numbers, dtype=np.float32).reshape(-1, 1)


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


def test_rows_are_looked_up_by_partition_key_and_number() -> None:
    slot_index, owner, _ = replay([([5, 7, 5, 5], [0, 1, 2, 3]), ([7, 7], [2, 0])])
    for key, count in zip(*(listed.tolist() for listed in slot_index.counts()), strict=True):
        slots = slot_index.slots(np.full(count, key), np.arange(count))
        assert sorted(slots.tolist()) == [slot for slot in owner if owner[slot] == key]


def test_without_partitions_the_number_of_a_row_is_its_slot() -> None:
    slot_index = SlotIndex(CAPACITY, partitioned=False)
    slot_index.record(ints([0, 1, 2]), ints([0, 0, 0]))
    assert slot_index.slots(ints([0, 0]), ints([2, 1])).tolist() == [2, 1]
    assert [listed.tolist() for listed in slot_index.counts()] == [[], []]
    assert (slot_index.sizes.tolist(), slot_index.members(0).tolist()) == ([3], [0, 1, 2])


def test_scores_of_kept_rows_are_stored_and_those_of_all_count_for_the_mean() -> None:
    slot_index = SlotIndex(CAPACITY, partitioned=False, width=1)
    slot_index.record(ints([1, -1, 0]), ints([0, 0, 0]), column([3, 5, 7]))
    assert slot_index.scores is not None
    assert slot_index.scores.stored[:2, 0].tolist() == [7, 3]
    assert slot_index.scores.centre(0, column([])).tolist() == [5]


@PROPERTY
@given(admissions())
def test_a_saved_index_goes_on_as_it_was(batches: list[tuple[list[int], list[int]]]) -> None:
    slot_index, _, _ = replay(batches)
    loaded = SlotIndex(CAPACITY, partitioned=True)
    loaded.load_state_dict(slot_index.state_dict())
    assert (loaded.count, loaded.offered) == (slot_index.count, slot_index.offered)
    np.testing.assert_equal(loaded.state_dict(), slot_index.state_dict())


@pytest.mark.parametrize(("count", "offered"), [(-1, 4), (5, 4), (CAPACITY + 1, 100)])
def test_a_count_that_cannot_be_is_refused(count: int, offered: int) -> None:
    state = {"count": count, "seen": offered, "partitions": None, "values": None}
    with pytest.raises(ValueError, match="rows stored of"):
        SlotIndex(CAPACITY, partitioned=False).load_state_dict(state)


@pytest.mark.parametrize(("slots", "places"), [([], None), ([3, 0], None), ([-1], []), ([4, -1, 0, -1], [0, 2])])
def test_kept_rows_are_those_with_a_slot(slots: list[int], places: list[int] | None) -> None:
    kept = kept_places(ints(slots))
    assert (None if kept is None else kept.tolist()) == places
