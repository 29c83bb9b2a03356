"""Equal shares of the buffer, and a fair sample within each. Tests of chance have fixed seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal_plugin.buffer.policies import Offer, balanced
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.errors import ConfigError
from tests.helpers.chance import SIGNIFICANCE, equally_likely
from tests.helpers.policy_runs import PROPERTY, STREAMS, Batches, Simulation, outcomes


def test_balanced_gives_equal_shares() -> None:
    assert Simulation("balanced", 12).run([[0] * 50, [1] * 20, [2] * 9]).sizes() == {0: 4, 1: 4, 2: 4}


def test_balanced_shares_differ_by_one_row_at_most_when_they_cannot_be_equal() -> None:
    sizes = Simulation("balanced", 11).run([[0, 1, 2] * 20, [2, 1, 0] * 9]).sizes()
    assert sorted(sizes.values()) == [3, 4, 4]


def test_balanced_fills_the_buffer_with_one_partition_until_others_come() -> None:
    assert Simulation("balanced", 10).run([[0] * 8, [0] * 8]).sizes() == {0: 10}


def test_balanced_makes_room_when_a_partition_first_appears() -> None:
    simulation = Simulation("balanced", 10).run([[0] * 40])
    simulation.offer([1] * 40)
    assert simulation.sizes() == {0: 5, 1: 5}


def test_balanced_gives_the_room_of_a_small_partition_to_the_others() -> None:
    assert Simulation("balanced", 10).run([[0] * 30, [1] * 2, [2] * 30]).sizes() == {0: 4, 1: 2, 2: 4}


def test_balanced_lets_a_small_partition_grow_to_its_share_later() -> None:
    simulation = Simulation("balanced", 12).run([[0] * 30, [1] * 2, [2] * 30])
    simulation.offer([1] * 30)
    assert simulation.sizes() == {0: 4, 1: 4, 2: 4}


def test_balanced_keeps_every_row_of_a_partition_below_its_share() -> None:
    simulation = Simulation("balanced", 10).run([[7, 7], *[[0] * 20 for _ in range(30)]])
    assert simulation.kept(7) == {0, 1}


def test_balanced_shares_do_not_follow_the_stream() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.choice(4, 16, p=[0.9, 0.06, 0.03, 0.01]).tolist() for _ in range(100)]
    assert Simulation("balanced", 32).run(batches).sizes() == {0: 8, 1: 8, 2: 8, 3: 8}


@PROPERTY
@given(capacity=st.integers(1, 30), batches=STREAMS)
def test_balanced_partitions_short_of_the_largest_have_lost_no_row(capacity: int, batches: Batches) -> None:
    simulation = Simulation("balanced", capacity).run(batches)
    sizes = simulation.sizes()
    for key in set(simulation.stream):
        short = sizes.get(key, 0) < max(sizes.values()) - 1
        assert not short or sizes.get(key, 0) == simulation.stream.count(key)


def test_balanced_has_one_row_each_for_the_first_when_partitions_outnumber_the_rows() -> None:
    assert Simulation("balanced", 3).run([[0, 0], [1, 2, 3], [4, 4]]).sizes() == {0: 1, 1: 1, 2: 1}


def test_balanced_never_grows_a_partition_that_has_turned_rows_away() -> None:
    """Its sample would not be uniform any more; here the room comes from a capacity that was raised."""
    simulation = Simulation("balanced", 12)
    simulation.slot_index.capacity = 4
    simulation.run([[0] * 20])
    simulation.slot_index.capacity = 12
    simulation.run([[0] * 20, [1] * 3])
    assert simulation.sizes() == {0: 4, 1: 3}


LATE = [[0] * 5, [0, 1, 0, 0], [1] * 4, [2, 2], [1, 0], [2, 2]]
"""Nine rows of 0, six of 1, four of 2; 1 appears in the middle of a batch, 2 when the buffer is shared already."""


@pytest.fixture(scope="module")
def late() -> list[Simulation]:
    return outcomes("balanced", 6, LATE, 2500)


@pytest.mark.parametrize(("key", "sets"), [(0, 36), (1, 15), (2, 6)])
def test_balanced_keeps_every_set_of_a_partitions_rows_with_the_same_chance(
    late: list[Simulation], key: int, sets: int
) -> None:
    """All sets of 2 rows of a partition, where partitions appear late and shares shrink twice."""
    assert equally_likely([simulation.kept(key) for simulation in late], sets) > SIGNIFICANCE


def test_balanced_decides_for_each_partition_on_its_own() -> None:
    """Which of two rows of 0 stays says nothing about which of two rows of 1 stays."""
    simulations = outcomes("balanced", 2, [[0, 1], [1, 0]], 2000)
    assert equally_likely([simulation.kept() for simulation in simulations], 4) > SIGNIFICANCE


def test_balanced_without_partitions_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.buffer\.partition_by"):
        balanced(SlotIndex(4, partitioned=False), Offer(np.zeros(2, dtype=np.int64)), np.random.default_rng(0))
