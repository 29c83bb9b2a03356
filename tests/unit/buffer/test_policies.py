"""What every policy keeps to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal_plugin.buffer.policies import POLICIES, Offer
from rehearsal_plugin.buffer.policies.base import last_writers
from tests.helpers.policy_runs import PROPERTY, STREAMS, Batches, Simulation

ALL = sorted(POLICIES)


@pytest.mark.parametrize("policy", ALL)
@PROPERTY
@given(capacity=st.integers(1, 12), batches=STREAMS)
def test_no_slot_is_given_twice_in_a_batch(policy: str, capacity: int, batches: Batches) -> None:
    simulation = Simulation(policy, capacity)
    for keys in batches:
        slots = simulation.offer(keys)
        kept = slots[slots >= 0]
        assert len(np.unique(kept)) == len(kept)


@pytest.mark.parametrize("policy", ALL)
@PROPERTY
@given(capacity=st.integers(1, 12), batches=STREAMS)
def test_slots_are_taken_without_gaps_and_within_capacity(policy: str, capacity: int, batches: Batches) -> None:
    simulation = Simulation(policy, capacity)
    for keys in batches:
        simulation.offer(keys)
        assert set(simulation.rows) == set(range(simulation.slot_index.count))
        assert simulation.slot_index.count <= capacity


@pytest.mark.parametrize("policy", ALL)
@PROPERTY
@given(capacity=st.integers(1, 12), batches=STREAMS)
def test_no_room_is_wasted(policy: str, capacity: int, batches: Batches) -> None:
    simulation = Simulation(policy, capacity).run(batches)
    assert simulation.slot_index.count == min(capacity, len(simulation.stream))


@pytest.mark.parametrize("policy", ALL)
@PROPERTY
@given(capacity=st.integers(1, 12), batches=STREAMS)
def test_partitions_list_the_slots_of_the_rows_stored_there(policy: str, capacity: int, batches: Batches) -> None:
    simulation = Simulation(policy, capacity).run(batches)
    partitions = simulation.slot_index.partitions
    assert partitions is not None
    for number, key in enumerate(partitions.keys.tolist()):
        slots = {slot for slot, row in simulation.rows.items() if simulation.stream[row] == key}
        assert sorted(partitions.members(number).tolist()) == sorted(slots)


@pytest.mark.parametrize("policy", ALL)
def test_a_policy_changes_nothing_by_itself(policy: str) -> None:
    simulation = Simulation(policy, 5).run([[1, 1, 2], [3, 3, 3, 3]])
    slot_index = simulation.slot_index
    assert slot_index.partitions is not None
    before = (
        slot_index.count,
        slot_index.offered,
        slot_index.partitions.sizes.copy(),
        slot_index.partitions.offered.copy(),
    )
    offer = Offer(np.array([0, 1, 2]), np.ones((3, 1), dtype=np.float32))
    POLICIES[policy](slot_index, offer, np.random.default_rng(0))
    np.testing.assert_equal(
        (slot_index.count, slot_index.offered, slot_index.partitions.sizes, slot_index.partitions.offered), before
    )


@pytest.mark.parametrize("policy", ALL)
def test_an_empty_batch_changes_nothing(policy: str) -> None:
    simulation = Simulation(policy, 5).run([[1] * 9])
    before = dict(simulation.rows)
    assert len(simulation.offer([])) == 0
    assert simulation.rows == before


@pytest.mark.parametrize("policy", sorted(set(ALL) - {"balanced"}))
def test_policies_without_shares_need_no_partitions(policy: str) -> None:
    assert len(Simulation(policy, 4, partitioned=False).run([[0] * 3, [0] * 7]).rows) == 4


@pytest.mark.parametrize("rows", [0, 1, 14, 64, 65, 300])
@pytest.mark.parametrize("places", [3, 50, 10_000])
def test_of_rows_that_go_to_one_slot_the_last_one_stays(rows: int, places: int) -> None:
    slots = np.random.default_rng(rows).integers(-1, places, rows)
    last = {slot: row for row, slot in enumerate(slots.tolist())}
    expected = [slot if last[slot] == row else -1 for row, slot in enumerate(slots.tolist())]
    assert last_writers(slots).tolist() == expected
