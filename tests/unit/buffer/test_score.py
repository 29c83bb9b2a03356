"""Rows of low scores leave sooner; chances are those computed by hand. Tests of chance have fixed seeds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from rehearsal_plugin.buffer.policies import POLICIES, Offer
from tests.helpers.chance import SIGNIFICANCE, equally_likely
from tests.helpers.policy_runs import BATCHINGS, PROPERTY, Simulation


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
