"""What rows are judged by: whole-number weights that can be drawn from, and means of all that was offered."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal_plugin.buffer.scores import MOST_TICKETS, TICKETS_PER_UNIT, Scores, SumTree, bounded_scores
from rehearsal_plugin.core.arrays import Float32Array, IntArray

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
CAPACITIES = [1, 2, 3, 5, 8, 13, 64, 100]


def ints(*numbers: int) -> IntArray:
    return np.array(numbers, dtype=np.int64)


def column(*numbers: float) -> Float32Array:
    return np.array(numbers, dtype=np.float32).reshape(-1, 1)


def laid_out(weights: IntArray) -> list[int]:
    """The slot at every point, by numpy alone."""
    slots: list[int] = np.repeat(np.arange(len(weights)), weights).tolist()
    return slots


def drawn(tree: SumTree) -> list[int]:
    """The slot at every point."""
    slots: list[int] = tree.find(np.arange(tree.total)).tolist()
    return slots


# The tree


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[dict[int, int]]]:
    """A capacity, and weights given to slots one set after the other."""
    capacity = draw(st.integers(1, 40))
    some = st.dictionaries(st.integers(0, capacity - 1), st.integers(0, 9), max_size=capacity)
    return capacity, draw(st.lists(some, max_size=6))


@PROPERTY
@given(histories())
def test_weights_are_laid_end_to_end_after_any_sets(history: tuple[int, list[dict[int, int]]]) -> None:
    capacity, sets = history
    tree, weights = SumTree(capacity), np.zeros(capacity, dtype=np.int64)
    for given_weights in sets:
        tree.set(ints(*given_weights), ints(*given_weights.values()))
        weights[list(given_weights)] = list(given_weights.values())
        assert tree.total == weights.sum()
        assert drawn(tree) == laid_out(weights)


@PROPERTY
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=70), st.randoms(use_true_random=False))
def test_large_weights_are_found_as_by_binary_search(weights: list[int], random: Random) -> None:
    tree, ends = SumTree(len(weights)), np.cumsum(weights)
    tree.set(np.arange(len(weights)), ints(*weights))
    if not tree.total:
        return
    edges = [point for end in ends.tolist() for point in (end - 1, end) if 0 <= point < tree.total]
    points = ints(0, tree.total - 1, *edges, *(random.randrange(tree.total) for _ in range(20)))
    assert tree.find(points).tolist() == np.searchsorted(ends, points, side="right").tolist()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_every_capacity_has_its_first_and_its_last_slot(capacity: int) -> None:
    tree = SumTree(capacity)
    assert tree.total == 0
    tree.set(ints(capacity - 1), ints(3))
    assert (tree.total, drawn(tree)) == (3, [capacity - 1] * 3)
    tree.set(np.arange(capacity), np.arange(capacity) + 1)
    assert tree.total == capacity * (capacity + 1) // 2
    assert drawn(tree) == laid_out(np.arange(capacity) + 1)


def test_a_weight_may_be_taken_back() -> None:
    tree = SumTree(5)
    tree.set(np.arange(5), ints(4, 4, 4, 4, 4))
    tree.set(ints(3, 0), ints(0, 0))
    assert drawn(tree) == [1] * 4 + [2] * 4 + [4] * 4


def test_nothing_set_and_nothing_asked_for_is_nothing() -> None:
    tree = SumTree(6)
    tree.set(ints(), ints())
    assert (tree.total, tree.find(ints()).tolist()) == (0, [])


def test_points_are_left_as_they_were() -> None:
    tree, points = SumTree(3), ints(5, 0, 2)
    tree.set(np.arange(3), ints(2, 2, 2))
    tree.find(points)
    assert points.tolist() == [5, 0, 2]


def test_a_full_buffer_of_the_highest_scores_stays_exact() -> None:
    tree = SumTree(1 << 16)
    tree.set(np.arange(1 << 16), np.full(1 << 16, MOST_TICKETS))
    points = ints(0, MOST_TICKETS - 1, MOST_TICKETS, tree.total - 1)
    assert tree.total == MOST_TICKETS << 16
    assert tree.find(points).tolist() == [0, 0, 1, (1 << 16) - 1]


# Tickets of scores


@pytest.mark.parametrize(
    ("score", "tickets"),
    [
        (1, TICKETS_PER_UNIT),
        (2.5, 2.5 * TICKETS_PER_UNIT),
        (0.25, TICKETS_PER_UNIT // 4),
        (0, 1),
        (-3, 1),
        (1e-9, 1),
        (MOST_TICKETS / TICKETS_PER_UNIT, MOST_TICKETS),
        (1e9, MOST_TICKETS),
        (-1e9, 1),
    ],
)
def test_a_row_holds_tickets_in_proportion_to_its_score_and_at_least_one(score: float, tickets: int) -> None:
    scores = Scores(3, width=1)
    scores.set(ints(0), column(score))
    assert drawn(scores.tickets(1)) == [0] * int(tickets)
    assert scores.stored[:, 0].tolist() == [np.float32(score), 0, 0]


def test_a_score_that_is_given_anew_takes_the_place_of_the_last() -> None:
    scores = Scores(3, width=1)
    scores.set(ints(0, 1, 2), column(1, 2, 3))
    scores.set(ints(2, 0), column(0, 4))
    assert scores.stored[:, 0].tolist() == [4, 2, 0]
    assert scores.tickets(3).total == 6 * TICKETS_PER_UNIT + 1


def test_tickets_follow_the_scores_from_their_first_use_on() -> None:
    scores = Scores(3, width=1)
    scores.set(ints(0, 1), column(1, 2))
    assert scores.tickets(2).total == 3 * TICKETS_PER_UNIT
    scores.set(ints(1, 2), column(5, 1))
    assert scores.tickets(3).total == 7 * TICKETS_PER_UNIT


# The lowest and the highest score


@PROPERTY
@given(st.lists(st.dictionaries(st.integers(0, 5), st.integers(-3, 3), max_size=6), min_size=1, max_size=12))
def test_the_extremes_are_those_of_all_scores_after_every_change(changes: list[dict[int, int]]) -> None:
    scores, stored = Scores(6, width=1), dict.fromkeys(range(6), 0.0)
    scores.set(np.arange(6), column(*stored.values()))
    for change in changes:
        assert scores.extremes(6) == (min(stored.values()), max(stored.values()))
        stored |= change
        scores.set(ints(*change), column(*change.values()))
    assert scores.extremes(6) == (min(stored.values()), max(stored.values()))


def test_the_extremes_are_those_of_the_rows_that_are_stored() -> None:
    scores = Scores(3, width=1)
    scores.set(ints(0), column(2))
    assert scores.extremes(1) == (2, 2)
    scores.set(ints(1), column(5))
    assert scores.extremes(2) == (2, 5)


def test_all_scores_are_looked_at_only_where_an_extreme_is_replaced() -> None:
    scores = Scores(4, width=1)
    scores.set(np.arange(4), column(1, 2, 3, 4))
    scores.extremes(4)
    scores.stored[3] = 9  # behind its back: whoever looks at all sees it
    scores.set(ints(1), column(7))
    assert scores.extremes(4) == (1, 7)
    scores.set(ints(0), column(2))
    assert scores.extremes(4) == (2, 9)


# Means


@PROPERTY
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(-50, 50), st.integers(-50, 50)), max_size=8), max_size=6)
)
def test_the_centre_is_the_mean_of_everything_offered(batches: list[list[tuple[int, int, int]]]) -> None:
    scores = Scores(2, width=2)
    offered: dict[int, list[tuple[int, int]]] = {}
    for batch in batches:
        owners = ints(*(owner for owner, *_ in batch))
        features = np.array([pair for _, *pair in batch], dtype=np.float32).reshape(-1, 2)
        for owner, first, second in batch:
            offered.setdefault(owner, []).append((first, second))
        for owner in np.unique(owners).tolist():
            centre = scores.centre(owner, features[owners == owner])
            np.testing.assert_allclose(centre, np.mean(offered[owner], axis=0))
        scores.count_offers(owners, features)
    for owner, pairs in offered.items():
        np.testing.assert_allclose(scores.centre(owner, np.empty((0, 2), dtype=np.float32)), np.mean(pairs, axis=0))


def test_the_centre_knows_rows_that_are_not_stored() -> None:
    scores = Scores(1, width=1)
    scores.count_offers(ints(0, 0, 0), column(1, 2, 9))
    scores.set(ints(0), column(9))
    assert scores.centre(0, column(8)).tolist() == [5]


def test_the_centre_of_many_rows_is_summed_in_double_precision() -> None:
    scores, many = Scores(1, width=1), np.full((1000, 1), 0.1, dtype=np.float32)
    for _ in range(1000):
        scores.count_offers(np.zeros(1000, dtype=np.int64), many)
    assert scores.centre(0, many).tolist() == pytest.approx([float(np.float32(0.1))], rel=1e-12)


def test_an_offer_of_no_rows_changes_no_mean() -> None:
    scores = Scores(1, width=1)
    scores.count_offers(ints(), np.empty((0, 1), dtype=np.float32))
    scores.count_offers(ints(2), column(4))
    scores.count_offers(ints(), np.empty((0, 1), dtype=np.float32))
    assert scores.centre(2, column(6)).tolist() == [5]
    assert scores.centre(0, column(6)).tolist() == [6]


def test_scores_keep_no_means() -> None:
    scores = Scores(1, width=1, means=False)
    scores.count_offers(ints(0), column(4))
    assert len(scores.state_dict(0)["sums"]) == 0


# Values that cannot be compared


def test_what_is_no_number_becomes_one_that_can_be_compared() -> None:
    given_values = column(np.nan, np.inf, -np.inf, 3e38, -3e38, 1.5, -0.25)
    before = given_values.copy()
    assert bounded_scores(given_values)[:, 0].tolist() == [0, 1e9, -1e9, 1e9, -1e9, 1.5, -0.25]
    np.testing.assert_array_equal(given_values, before)


def test_the_largest_values_keep_means_and_squares_finite() -> None:
    scores, largest = Scores(2, width=3), bounded_scores(np.full((4, 3), np.inf, dtype=np.float32))
    scores.count_offers(np.zeros(4, dtype=np.int64), largest)
    centre = scores.centre(0, -largest)
    assert np.isfinite(centre).all()
    assert np.isfinite(((largest.astype(np.float64) + centre) ** 2).sum())


def test_bounded_values_stay_single_precision() -> None:
    assert bounded_scores(column(1, np.nan)).dtype == np.float32
