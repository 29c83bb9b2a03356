"""Herding and closest to centre: the rows that stand for their partition's mean."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from tests.helpers.policy_runs import STREAMS, Batches, Simulation

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
