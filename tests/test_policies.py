"""Who stays in a full buffer. Statistics are tested at the significance of `tests.chance`, with fixed seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.occupancy import Occupancy
from rehearsal_plugin.policies import POLICIES, Offer, balanced
from rehearsal_plugin.shares import IntArray
from tests.chance import SIGNIFICANCE, equally_included, equally_likely

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
ALL = sorted(POLICIES)
KEYS = st.sampled_from([0, 1, 2, 3, -1, -(2**63)])
STREAMS = st.lists(st.lists(KEYS, max_size=15), max_size=10)
Batches = Sequence[Sequence[int]]


class Simulation:
    """A buffer that stores the number of each row in the stream, and remembers every decision in plain dicts."""

    def __init__(self, policy: str, capacity: int, seed: int = 0, partitioned: bool = True) -> None:
        self.occupancy = Occupancy(capacity, partitioned, width=1)
        self.rows: dict[int, int] = {}
        self.stream: list[int] = []
        self._policy, self._rng = POLICIES[policy], np.random.default_rng(seed)

    def offer(self, keys: Sequence[int], values: Sequence[float] | None = None) -> IntArray:
        """Rows by their keys, judged by values; without them, by numbers of a fixed sequence."""
        wide, partitions = np.array(keys, dtype=np.int64), self.occupancy.partitions
        owners = np.zeros(len(keys), dtype=np.int64) if partitions is None else partitions.number(wide)
        given = np.sin(np.arange(len(keys)) + len(self.stream)) if values is None else np.array(values)
        judged = given.reshape(-1, 1).astype(np.float32)
        slots = self._policy(self.occupancy, Offer(owners, judged), self._rng)
        self.occupancy.record(slots, owners, judged)
        first = len(self.stream)
        self.rows.update({slot: first + i for i, slot in enumerate(slots.tolist()) if slot >= 0})
        self.stream.extend(keys)
        return slots

    def run(self, batches: Batches) -> Simulation:
        for keys in batches:
            self.offer(keys)
        return self

    def kept(self, key: int | None = None) -> frozenset[int]:
        return frozenset(row for row in self.rows.values() if key is None or self.stream[row] == key)

    def sizes(self) -> dict[int, int]:
        return dict(Counter(self.stream[row] for row in self.rows.values()))


def outcomes(policy: str, capacity: int, batches: Batches, trials: int) -> list[Simulation]:
    """Independent runs."""
    return [Simulation(policy, capacity, seed).run(batches) for seed in range(trials)]


# What every policy keeps to


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
        assert set(simulation.rows) == set(range(simulation.occupancy.count))
        assert simulation.occupancy.count <= capacity


@pytest.mark.parametrize("policy", ALL)
@PROPERTY
@given(capacity=st.integers(1, 12), batches=STREAMS)
def test_no_room_is_wasted(policy: str, capacity: int, batches: Batches) -> None:
    simulation = Simulation(policy, capacity).run(batches)
    assert simulation.occupancy.count == min(capacity, len(simulation.stream))


@pytest.mark.parametrize("policy", ALL)
@PROPERTY
@given(capacity=st.integers(1, 12), batches=STREAMS)
def test_partitions_list_the_slots_of_the_rows_stored_there(policy: str, capacity: int, batches: Batches) -> None:
    simulation = Simulation(policy, capacity).run(batches)
    partitions = simulation.occupancy.partitions
    assert partitions is not None
    for number, key in enumerate(partitions.keys.tolist()):
        slots = {slot for slot, row in simulation.rows.items() if simulation.stream[row] == key}
        assert sorted(partitions.members(number).tolist()) == sorted(slots)


@pytest.mark.parametrize("policy", ALL)
def test_a_policy_changes_nothing_by_itself(policy: str) -> None:
    simulation = Simulation(policy, 5).run([[1, 1, 2], [3, 3, 3, 3]])
    occupancy = simulation.occupancy
    assert occupancy.partitions is not None
    before = (occupancy.count, occupancy.seen, occupancy.partitions.sizes.copy(), occupancy.partitions.seen.copy())
    offer = Offer(np.array([0, 1, 2]), np.ones((3, 1), dtype=np.float32))
    POLICIES[policy](occupancy, offer, np.random.default_rng(0))
    np.testing.assert_equal(
        (occupancy.count, occupancy.seen, occupancy.partitions.sizes, occupancy.partitions.seen), before
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


# Reservoir


BATCHINGS = {
    "one by one": [1] * 6,
    "one batch larger than the buffer": [6],
    "uneven": [2, 0, 3, 1],
    "within, then larger than the buffer": [1, 5],
    "larger than the buffer, then one by one": [4, 1, 1],
}


@pytest.mark.parametrize("sizes", BATCHINGS.values(), ids=list(BATCHINGS))
def test_reservoir_keeps_every_set_of_rows_with_the_same_chance(sizes: list[int]) -> None:
    """All 20 sets of 3 out of 6 rows: single rows, pairs and triples at once."""
    batches = [[0] * size for size in sizes]
    kept = [simulation.kept() for simulation in outcomes("reservoir", 3, batches, 2500)]
    assert equally_likely(kept, 20) > SIGNIFICANCE


def test_reservoir_of_one_row_keeps_any_row_with_the_same_chance() -> None:
    kept = [simulation.kept() for simulation in outcomes("reservoir", 1, [[0] * 3, [0] * 4, [0]], 2500)]
    assert equally_likely(kept, 8) > SIGNIFICANCE


def test_reservoir_keeps_rows_of_a_long_stream_with_the_same_chance() -> None:
    batches = [[0] * size for size in np.random.default_rng(0).integers(0, 90, 20)]
    simulations = outcomes("reservoir", 50, batches, 600)
    counts = Counter(chain.from_iterable(simulation.kept() for simulation in simulations))
    rows = len(simulations[0].stream)
    assert equally_included([counts[row] for row in range(rows)], len(simulations), 50) > SIGNIFICANCE


def test_reservoir_ignores_partitions() -> None:
    stream = [[0, 1, 1], [2, 0, 0, 1]]
    rows = [Simulation("reservoir", 3, seed=5, partitioned=split).run(stream).rows for split in (True, False)]
    assert rows[0] == rows[1]


# Balanced


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
    simulation.occupancy.capacity = 4
    simulation.run([[0] * 20])
    simulation.occupancy.capacity = 12
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
        balanced(Occupancy(4, partitioned=False), Offer(np.zeros(2, dtype=np.int64)), np.random.default_rng(0))


# Random replace


def test_random_replace_keeps_every_row_until_the_buffer_is_full() -> None:
    assert Simulation("random_replace", 10).run([[0] * 4, [0] * 6]).kept() == frozenset(range(10))


def test_random_replace_always_keeps_the_last_row() -> None:
    assert all(19 in simulation.kept() for simulation in outcomes("random_replace", 4, [[0] * 7, [0] * 13], 200))


@pytest.mark.parametrize("row", [0, 7, 8, 20, 30], ids=lambda row: f"row {row}")
@pytest.mark.parametrize("size", [1, 8, 40], ids=lambda size: f"batches of {size}")
def test_random_replace_decays_geometrically(row: int, size: int) -> None:
    """A row survives each later one with probability 1 - 1/capacity, once the buffer is full."""
    capacity, stream, trials = 8, 40, 600
    simulations = outcomes("random_replace", capacity, [[0] * size] * (stream // size), trials)
    survived = sum(row in simulation.kept() for simulation in simulations)
    chance = (1 - 1 / capacity) ** (stream - max(row + 1, capacity))
    assert binomtest(survived, trials, chance).pvalue > SIGNIFICANCE


# FIFO


@pytest.mark.parametrize("sizes", BATCHINGS.values(), ids=list(BATCHINGS))
def test_fifo_keeps_the_newest(sizes: list[int]) -> None:
    assert Simulation("fifo", 3).run([[0] * size for size in sizes]).kept() == {3, 4, 5}


def test_fifo_goes_on_where_it_was_after_a_batch_larger_than_the_buffer() -> None:
    assert Simulation("fifo", 3).run([[0] * 7, [0], [0]]).kept() == {6, 7, 8}
