"""Who stays in a full buffer. Statistics are tested at the significance of `tests.helpers.chance`, with fixed seeds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, chisquare

from rehearsal_plugin.buffer.policies import POLICIES, Offer, balanced
from rehearsal_plugin.buffer.policies.base import last_writers
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import ConfigError
from tests.helpers.chance import SIGNIFICANCE, equally_included, equally_likely

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
ALL = sorted(POLICIES)
KEYS = st.sampled_from([0, 1, 2, 3, -1, -(2**63)])
STREAMS = st.lists(st.lists(KEYS, max_size=15), max_size=10)
Batches = Sequence[Sequence[int]]


class Simulation:
    """A buffer that stores the number of each row in the stream, and remembers every decision in plain dicts."""

    def __init__(self, policy: str, capacity: int, seed: int = 0, partitioned: bool = True, width: int = 1) -> None:
        self.slot_index = SlotIndex(capacity, partitioned, width)
        self.rows: dict[int, int] = {}
        self.stream: list[int] = []
        self._policy, self._rng = POLICIES[policy], np.random.default_rng(seed)

    def offer(self, keys: Sequence[int], values: ArrayLike | None = None) -> IntArray:
        """Rows by their keys, judged by values; without them, by numbers of a fixed sequence."""
        wide, partitions = np.array(keys, dtype=np.int64), self.slot_index.partitions
        owners = np.zeros(len(keys), dtype=np.int64) if partitions is None else partitions.number(wide)
        given = np.sin(np.arange(len(keys)) + len(self.stream)) if values is None else np.array(values)
        judged = given.reshape(len(keys), -1 if len(keys) else 1).astype(np.float32)
        slots = self._policy(self.slot_index, Offer(owners, judged), self._rng)
        self.slot_index.record(slots, owners, judged)
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


# Score


def judged(capacity: int, batches: Sequence[Sequence[float]], seed: int = 0) -> Simulation:
    """A run of the policy 'score' over batches of scores."""
    simulation = Simulation("score", capacity, seed, partitioned=False)
    for scores in batches:
        simulation.offer([0] * len(scores), scores)
    return simulation


@pytest.mark.parametrize(
    ("level", "batching"), [(0.0, "one by one"), (-2.5, "uneven"), (1e9, "within, then larger than the buffer")]
)
def test_rows_of_one_score_are_kept_as_by_a_reservoir(level: float, batching: str) -> None:
    batches = [[level] * size for size in BATCHINGS[batching]]
    kept = [judged(3, batches, seed).kept() for seed in range(1200)]
    assert equally_likely(kept, 20) > SIGNIFICANCE


SCORES = [0.5, 4.0, 0.0, 1.0, 3.0, 2.0]


def sets_by_hand(capacity: int, scores: Sequence[float]) -> dict[frozenset[int], Fraction]:
    """The chance of every set of rows that may be stored in the end, where rows come one by one."""
    chances = {frozenset(range(capacity)): Fraction(1)}
    for row in range(capacity, len(scores)):
        after: dict[frozenset[int], Fraction] = defaultdict(Fraction)
        for stored, chance in chances.items():
            admitted = Fraction(capacity, row + 1)
            after[stored] += chance * (1 - admitted)
            gaps = {old: Fraction(max(scores[each] for each in stored) - scores[old]) for old in stored}
            for old in stored:
                after[stored - {old} | {row}] += chance * admitted * gaps[old] / sum(gaps.values())
        chances = dict(after)
    return {stored: chance for stored, chance in chances.items() if chance}


def test_score_keeps_every_set_of_rows_with_the_chance_computed_by_hand() -> None:
    expected = sets_by_hand(3, SCORES)
    kept = Counter(judged(3, [[score] for score in SCORES], seed).kept() for seed in range(1500))
    assert kept.keys() <= expected.keys()
    counts = [kept[stored] for stored in expected]
    assert chisquare(counts, [float(1500 * chance) for chance in expected.values()]).pvalue > SIGNIFICANCE


def decisions(scores: Sequence[float], seen: int, offered: int, trials: int) -> list[tuple[int, ...]]:
    """Slots that a full buffer of these scores gives to so many rows, again and again."""
    slot_index, rng = judged(len(scores), [scores]).slot_index, np.random.default_rng(0)
    slot_index.offered = seen
    offer = Offer(np.zeros(offered, dtype=np.int64), np.full((offered, 1), -9, dtype=np.float32))
    return [tuple(POLICIES["score"](slot_index, offer, rng).tolist()) for _ in range(trials)]


def test_score_lets_the_rows_of_a_batch_take_the_places_of_low_scores() -> None:
    """Two rows go, one after the other, each with a chance in proportion to its distance from the highest."""
    gaps = [4.0, 2.0, 1.0, 0.0]
    given = decisions([1 - gap for gap in gaps], seen=4, offered=2, trials=5000)
    pairs = Counter(tuple(sorted(slots)) for slots in given if min(slots) >= 0)
    chances = {
        (a, b): gaps[a] * gaps[b] / sum(gaps) * (1 / (sum(gaps) - gaps[a]) + 1 / (sum(gaps) - gaps[b]))
        for a, b in ((0, 1), (0, 2), (1, 2))
    }
    assert pairs.keys() <= chances.keys(), "the highest never goes"
    expected = [pairs.total() * chance for chance in chances.values()]
    assert chisquare([pairs[pair] for pair in chances], expected).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("row", [4, 7, 39], ids=lambda row: f"row {row}")
def test_score_admits_a_row_with_the_chance_of_a_reservoir_whatever_its_score(row: int) -> None:
    admitted = sum(slot >= 0 for (slot,) in decisions([3.0, 0.0, 2.0, 1.0], seen=row, offered=1, trials=4000))
    assert binomtest(admitted, 4000, 4 / (row + 1)).pvalue > SIGNIFICANCE


@PROPERTY
@given(st.integers(2, 8), st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=60), st.integers(0, 2**31))
def test_score_never_lets_the_highest_of_several_go(capacity: int, scores: list[float], seed: int) -> None:
    simulation = Simulation("score", capacity, seed, partitioned=False)
    for score in scores:
        before = {row: scores[row] for row in simulation.kept()}
        simulation.offer([0], [score])
        if before:
            assert max(before.values()) in {scores[row] for row in simulation.kept()}


@PROPERTY
@given(st.integers(2, 8), st.lists(st.lists(st.integers(-9, 9), max_size=20), max_size=8), st.integers(0, 2**31))
def test_score_keeps_the_highest_stored_row_unless_a_batch_replaces_all(
    capacity: int, batches: list[list[float]], seed: int
) -> None:
    simulation = Simulation("score", capacity, seed, partitioned=False)
    scores = list(chain.from_iterable(batches))
    for batch in batches:
        before = simulation.kept()
        simulation.offer([0] * len(batch), batch)
        if before & simulation.kept():
            assert max(scores[row] for row in before) in {scores[row] for row in before & simulation.kept()}


def test_score_follows_scores_that_changed() -> None:
    for seed in range(50):
        simulation = judged(3, [[5.0, 6.0, 7.0]], seed)
        assert simulation.slot_index.scores is not None
        simulation.slot_index.scores.set(np.arange(3), np.array([[9.0], [9.0], [0.0]], dtype=np.float32))
        simulation.offer([0], [9.0])
        assert simulation.kept() in ({0, 1, 2}, {0, 1, 3})


def test_low_scores_leave_sooner() -> None:
    """In a long stream, what is stored longest is what scores highest."""
    scores = np.random.default_rng(0).permutation(200).astype(float)
    batches = scores.reshape(40, 5).tolist()
    kept = [judged(20, batches, seed).kept() for seed in range(60)]
    assert np.mean([scores[list(rows)].mean() for rows in kept]) > 120, "a reservoir's mean is 99.5"


# Herding and closest to centre

CHOICES = ["herding", "closest_to_centre"]


def offered_features(
    policy: str, capacity: int, batches: Sequence[tuple[Sequence[int], ArrayLike]], partitioned: bool = True
) -> Simulation:
    width = max(np.asarray(features).reshape(len(keys), -1).shape[1] for keys, features in batches)
    simulation = Simulation(policy, capacity, partitioned=partitioned, width=width)
    for keys, features in batches:
        simulation.offer(keys, features)
    return simulation


@pytest.mark.parametrize("partitioned", [True, False])
@pytest.mark.parametrize(("policy", "order"), [("herding", [1, 0, 2]), ("closest_to_centre", [1, 2, 0])])
def test_rows_are_preferred_in_the_order_that_avalanche_gives_them(
    policy: str, order: list[int], partitioned: bool
) -> None:
    for capacity in (1, 2, 3):
        simulation = offered_features(policy, capacity, [([0] * 3, [0, 4, 5])], partitioned)
        assert simulation.kept() == set(order[:capacity])


@pytest.mark.parametrize("policy", CHOICES)
def test_partitions_share_equally(policy: str) -> None:
    assert Simulation(policy, 12).run([[0] * 50, [1] * 20, [2] * 9]).sizes() == {0: 4, 1: 4, 2: 4}
    sizes = Simulation(policy, 11).run([[0, 1, 2] * 20, [2, 1, 0] * 9]).sizes()
    assert sorted(sizes.values()) == [3, 4, 4]


@pytest.mark.parametrize("policy", CHOICES)
def test_a_small_partition_keeps_all_and_leaves_its_room_to_the_others(policy: str) -> None:
    simulation = Simulation(policy, 10).run([[7, 7], *[[0] * 20 for _ in range(5)]])
    assert simulation.kept(7) == {0, 1}
    assert simulation.sizes() == {7: 2, 0: 8}


@pytest.mark.parametrize(("policy", "best"), [("herding", {1, 0}), ("closest_to_centre", {1, 2})])
def test_a_partition_that_appears_later_shrinks_the_others_which_keep_their_best(policy: str, best: set[int]) -> None:
    simulation = offered_features(policy, 4, [([0] * 3, [0, 4, 5]), ([1] * 5, [10, 10, 10, 10, 10])])
    assert simulation.kept(0) == best
    assert simulation.sizes() == {0: 2, 1: 2}


@pytest.mark.parametrize("policy", CHOICES)
def test_the_mean_is_that_of_everything_offered_and_not_of_what_is_stored(policy: str) -> None:
    """It is 5.9, and that of the stored row and the new ones is 3.6."""
    simulation = offered_features(policy, 1, [([0] * 9, [8] * 9), ([0] * 6, [7, 2, 2, 2, 2, 2])])
    assert simulation.kept() == {9}


@pytest.mark.parametrize("policy", CHOICES)
def test_a_partition_that_is_not_in_the_batch_shrinks_by_its_whole_mean_too(policy: str) -> None:
    """Stored are rows at 4 and 9, as near to their own mean; that of all rows is 8."""
    simulation = offered_features(policy, 2, [([0] * 4, [4, 9, 15, 4])])
    assert simulation.kept() == {0, 1}
    simulation.offer([1], [20])
    assert simulation.kept() == {1, 4}


class ByHand:
    """Exemplars with plain lists: what each partition offered, and what it kept."""

    def __init__(self, policy: str, capacity: int) -> None:
        self._policy, self._capacity = policy, capacity
        self._offered: dict[int, list[int]] = {}
        self._stored: dict[int, list[int]] = {}
        self._features: list[NDArray[np.float64]] = []

    def offer(self, keys: Sequence[int], features: NDArray[np.float32]) -> None:
        first = len(self._features)
        self._features += list(features.astype(np.float64))
        for key in sorted(set(keys)):  # as partitions are numbered
            self._offered.setdefault(key, [])
            self._stored.setdefault(key, [])
        for row, key in enumerate(keys, first):
            self._offered[key].append(row)
            self._stored[key].append(row)
        shares = self._shares()
        for key, rows in self._stored.items():
            if len(rows) > shares[key]:
                self._stored[key] = self._best(key, shares[key])

    def kept(self) -> frozenset[int]:
        return frozenset(chain.from_iterable(self._stored.values()))

    def _shares(self) -> dict[int, int]:
        """Places dealt out one by one, in turn, to whoever has rows for them."""
        shares = dict.fromkeys(self._stored, 0)
        for key in [key for _, key in product(range(self._capacity), self._stored)]:
            if sum(shares.values()) < self._capacity and shares[key] < len(self._stored[key]):
                shares[key] += 1
        return shares

    def _best(self, key: int, count: int) -> list[int]:
        mean = np.mean([self._features[row] for row in self._offered[key]], axis=0)
        left, chosen = list(self._stored[key]), list[int]()
        while len(chosen) < count:
            together = chosen if self._policy == "herding" else []
            gaps = [np.linalg.norm(np.mean(self._taken([*together, row]), axis=0) - mean) for row in left]
            chosen.append(left.pop(int(np.argmin(gaps))))
        return chosen

    def _taken(self, rows: Sequence[int]) -> list[NDArray[np.float64]]:
        return [self._features[row] for row in rows]


@pytest.mark.parametrize("policy", CHOICES)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(capacity=st.integers(1, 12), batches=STREAMS, seed=st.integers(0, 2**31))
def test_exemplars_are_those_chosen_by_hand(policy: str, capacity: int, batches: Batches, seed: int) -> None:
    rng, simulation, by_hand = (
        np.random.default_rng(seed),
        Simulation(policy, capacity, width=3),
        ByHand(policy, capacity),
    )
    for keys in filter(None, batches):
        features = rng.normal(size=(len(keys), 3)).astype(np.float32)
        simulation.offer(keys, features)
        by_hand.offer(keys, features)
        assert simulation.kept() == by_hand.kept()


@pytest.mark.parametrize("policy", CHOICES)
def test_exemplars_of_one_batch_do_not_depend_on_the_partitions_beside_them(policy: str) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 2))
    together = offered_features(policy, 8, [([0, 1] * 15, features)])
    alone = [offered_features(policy, 4, [([0] * 15, features[key::2])]).kept() for key in (0, 1)]
    assert [together.kept(key) for key in (0, 1)] == [{2 * row + key for row in rows} for key, rows in enumerate(alone)]


def test_herding_stands_for_the_mean_better_than_single_rows_near_it() -> None:
    features = np.random.default_rng(1).normal(size=(200, 4))
    gaps = {}
    for policy in CHOICES:
        rows = sorted(offered_features(policy, 10, [([0] * 200, features)]).kept())
        gaps[policy] = float(np.linalg.norm(features[rows].mean(axis=0) - features.mean(axis=0)))
    assert gaps["herding"] < gaps["closest_to_centre"] / 2


@pytest.mark.parametrize("policy", CHOICES)
def test_exemplars_of_more_partitions_than_rows_leave_some_without(policy: str) -> None:
    assert sum(Simulation(policy, 3).run([[0, 0], [1, 2, 3], [4, 4]]).sizes().values()) == 3
