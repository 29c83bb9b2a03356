"""The global draw. Statistics are tested at the significance of `tests.helpers.chance`, with fixed seeds."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.distributed.draw import Draws, draw, plan
from rehearsal_plugin.distributed.without_replacement import choose
from tests.helpers.chance import SIGNIFICANCE, equally_included, equally_likely

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
Row = tuple[int, int, int]  # owner, partition, index

UNEQUAL = [[3], [0], [1], [40], [0], [6]]
"""Rows of six ranks in one partition; two ranks hold none."""


def table(counts: Sequence[Sequence[int]]) -> IntArray:
    return np.array(counts, dtype=np.int64).reshape(len(counts), -1)


def one(counts: Sequence[Sequence[int]], requests: Sequence[int], step: int = 0, stream: int = 0) -> Draws:
    rng = generator(0, Purpose.DRAW, step, stream)
    return draw(table(counts), np.array(requests, dtype=np.int64), rng)


def rows_of(draws: Draws, reader: int = 0) -> list[Row]:
    mine = draws.reader == reader
    columns = (draws.owner[mine].tolist(), draws.partition[mine].tolist(), draws.index[mine].tolist())
    return list(zip(*columns, strict=True))


def many(counts: Sequence[Sequence[int]], wanted: int, trials: int) -> Iterator[list[Row]]:
    """What rank 0 gets in independent steps."""
    requests = [wanted] + [0] * (len(counts) - 1)
    return (rows_of(one(counts, requests, step)) for step in range(trials))


@st.composite
def situations(draw_from: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Rows by rank and partition, and what every rank asks for."""
    ranks, partitions = draw_from(st.integers(1, 6)), draw_from(st.integers(0, 5))
    row = st.lists(st.integers(0, 12), min_size=partitions, max_size=partitions)
    requests = st.lists(st.integers(0, 30), min_size=ranks, max_size=ranks)
    return draw_from(st.lists(row, min_size=ranks, max_size=ranks)), draw_from(requests)


# What every draw keeps to


@PROPERTY
@given(situations())
def test_everyone_gets_what_was_asked_for_or_all_there_is(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    draws = one(counts, requests)
    received = np.bincount(draws.reader, minlength=len(requests))
    assert received.tolist() == np.minimum(requests, np.sum(counts, dtype=np.int64)).tolist()


@PROPERTY
@given(situations())
def test_nobody_gets_a_row_twice(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    draws = one(counts, requests)
    for reader in range(len(requests)):
        rows = rows_of(draws, reader)
        assert len(set(rows)) == len(rows)


@PROPERTY
@given(situations())
def test_every_drawn_row_exists(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    draws = one(counts, requests)
    assert (draws.index >= 0).all()
    assert (draws.index < table(counts)[draws.owner, draws.partition]).all()


@PROPERTY
@given(situations())
def test_partitions_give_equally_many_as_far_as_they_can(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    draws, totals = one(counts, requests), table(counts).sum(axis=0)
    for reader in range(len(requests)):
        given_rows = np.bincount(draws.partition[draws.reader == reader], minlength=len(totals))
        short = given_rows < given_rows.max(initial=0) - 1
        assert (given_rows[short] == totals[short]).all()


@PROPERTY
@given(situations())
def test_each_rank_sends_what_the_others_expect(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    ranks = len(requests)
    plans = [plan(one(counts, requests), rank, ranks) for rank in range(ranks)]
    sent = np.array([p.send_counts for p in plans])
    assert (sent == np.array([p.recv_counts for p in plans]).T).all()


@PROPERTY
@given(situations())
def test_the_plans_move_exactly_the_drawn_rows(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    draws, ranks = one(counts, requests), len(requests)
    moved: list[tuple[int, ...]] = []
    for owner in range(ranks):
        part = plan(draws, owner, ranks)
        readers = np.repeat(np.arange(ranks), part.send_counts)
        moved += zip(
            readers.tolist(), [owner] * len(readers), part.partition.tolist(), part.index.tolist(), strict=True
        )
    columns = (draws.reader, draws.owner, draws.partition, draws.index)
    assert sorted(moved) == sorted(zip(*(column.tolist() for column in columns), strict=True))


@PROPERTY
@given(situations())
def test_all_ranks_know_how_many_rows_move(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    plans = [plan(one(counts, requests), rank, len(requests)) for rank in range(len(requests))]
    assert {p.moved for p in plans} == {sum(sum(p.send_counts) for p in plans)}


def test_the_same_seed_and_step_give_the_same_draw() -> None:
    first, again = (one(UNEQUAL, [5, 0, 9, 1, 2, 60], step=3) for _ in range(2))
    np.testing.assert_equal(vars(first), vars(again))


def test_the_table_and_the_requests_are_left_as_they_were() -> None:
    counts, requests = table([[3, 1], [0, 9]]), np.array([4, 7])
    draw(counts, requests, np.random.default_rng(0))
    assert (counts.tolist(), requests.tolist()) == ([[3, 1], [0, 9]], [4, 7])


# Corners


def test_no_rows_anywhere_is_an_empty_draw() -> None:
    assert len(one([[0], [0]], [5, 5]).owner) == 0


def test_no_partition_yet_is_an_empty_draw() -> None:
    assert len(one([[], []], [5, 5]).owner) == 0


def test_nothing_asked_for_is_an_empty_draw() -> None:
    assert len(one([[5], [5]], [0, 0]).owner) == 0


def test_an_empty_draw_makes_empty_plans() -> None:
    part = plan(one([[0], [0]], [5, 5]), 1, 2)
    assert (part.send_counts, part.recv_counts, part.moved, len(part.index)) == ([0, 0], [0, 0], 0, 0)


def test_fewer_rows_than_asked_for_are_all_of_them() -> None:
    everything = [(rank, 0, i) for rank, (size,) in enumerate(UNEQUAL) for i in range(size)]
    assert sorted(rows_of(one(UNEQUAL, [1000, 0, 0, 0, 0, 0]))) == everything


def test_as_many_rows_as_asked_for_are_all_of_them() -> None:
    assert sorted(rows_of(one([[1, 2], [0, 1]], [4, 0]))) == [(0, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0)]


def test_the_only_row_goes_to_everyone() -> None:
    draws = one([[0], [1], [0]], [1, 1, 7])
    assert (draws.reader.tolist(), draws.owner.tolist(), draws.index.tolist()) == ([0, 1, 2], [1, 1, 1], [0, 0, 0])


# Uniform over all rows of all ranks


@pytest.mark.parametrize("wanted", [1, 7, 24, 26, 45], ids=lambda wanted: f"{wanted} of 50")
def test_every_row_of_every_rank_has_the_same_chance(wanted: int) -> None:
    trials = 2000
    counts = Counter(row for rows in many(UNEQUAL, wanted, trials) for row in rows)
    every = [counts[rank, 0, i] for rank, (size,) in enumerate(UNEQUAL) for i in range(size)]
    assert sum(every) == wanted * trials
    assert equally_included(every, trials, wanted) > SIGNIFICANCE


@pytest.mark.parametrize(("wanted", "sets"), [(1, 6), (2, 15), (3, 20), (4, 15), (5, 6)])
def test_every_set_of_rows_has_the_same_chance(wanted: int, sets: int) -> None:
    """Single rows, pairs and larger sets at once, out of 6 rows on 4 ranks of which one is empty."""
    drawn = (frozenset(rows) for rows in many([[1], [0], [3], [2]], wanted, 4000))
    assert equally_likely(drawn, sets) > SIGNIFICANCE


def test_two_ranks_draw_independently_of_each_other() -> None:
    draws = (one([[3], [1]], [1, 1], step) for step in range(4000))
    assert equally_likely(((*rows_of(d, 0), *rows_of(d, 1)) for d in draws), 16) > SIGNIFICANCE


def test_ranks_that_ask_for_different_numbers_draw_independently_of_each_other() -> None:
    draws = (one([[2], [2]], [1, 2], step) for step in range(4000))
    assert equally_likely(((*rows_of(d, 0), frozenset(rows_of(d, 1))) for d in draws), 24) > SIGNIFICANCE


def test_one_step_says_nothing_about_the_next() -> None:
    drawn = [rows_of(one([[2], [3]], [1, 0], step))[0] for step in range(4001)]
    assert equally_likely(pairwise(drawn), 25) > SIGNIFICANCE


def test_draws_of_the_own_rows_alone_differ_between_ranks() -> None:
    """`scope: local`: a table of one rank, and a stream of random numbers for each."""
    pairs = ((rows_of(one([[5]], [1], s, stream=1))[0], rows_of(one([[5]], [1], s, stream=2))[0]) for s in range(4000))
    assert equally_likely(pairs, 25) > SIGNIFICANCE


def test_a_million_million_rows_are_drawn_from_to_the_last() -> None:
    rows = np.concatenate([one([[10**12], [0], [3 * 10**12]], [1000, 0, 0], step).owner for step in range(20)])
    observed = np.bincount(rows, minlength=3)[[0, 2]]
    assert chi2_contingency([observed, [10**6, 3 * 10**6]]).pvalue > SIGNIFICANCE


# Balanced: an equal chance for every partition

SKEWED = [[1, 500, 20], [0, 500, 0], [0, 0, 80]]
"""Rows of three ranks in three partitions: 1, 1000 and 100."""


@pytest.mark.parametrize("size", [40, 1 << 50])
def test_no_item_stands_twice_in_a_segment_however_large_the_numbers(size: int) -> None:
    wanted = np.random.default_rng(0).integers(3, 20, 1 << 14)
    segment, item = choose(np.full(len(wanted), size), wanted, np.random.default_rng(1))
    assert np.array_equal(np.bincount(segment), wanted)
    assert len(np.unique(np.stack((segment, item)), axis=1)[0]) == wanted.sum()
    assert 0 <= item.min() <= item.max() < size


def test_equal_numbers_from_partitions_of_very_different_size() -> None:
    draws = one([[10, 500, 20], [2, 500, 80]], [30, 0])
    assert np.bincount(draws.partition).tolist() == [10, 10, 10]


def test_a_small_partition_gives_all_and_the_others_the_rest() -> None:
    assert np.bincount(one(SKEWED, [21, 0, 0]).partition).tolist() == [1, 10, 10]


@pytest.mark.parametrize(("wanted", "cases"), [(1, 4), (3, 4), (5, 4), (6, 6), (7, 4)])
def test_odd_rows_go_to_partitions_at_random(wanted: int, cases: int) -> None:
    counts = [[50, 4, 1000, 9], [0, 4, 7, 3]]
    quotas = (tuple(sorted(Counter(p for _, p, _ in rows).items())) for rows in many(counts, wanted, 3000))
    assert equally_likely(quotas, cases) > SIGNIFICANCE


def test_odd_rows_of_one_reader_say_nothing_about_those_of_another() -> None:
    draws = (one([[9, 5, 30], [1, 0, 70]], [1, 1], step) for step in range(4000))
    pairs = ((rows_of(d, 0)[0][1], rows_of(d, 1)[0][1]) for d in draws)
    assert equally_likely(pairs, 9) > SIGNIFICANCE


def test_partitions_without_rows_get_no_chance() -> None:
    assert {p for rows in many([[0, 3, 0], [0, 2, 5]], 1, 200) for _, p, _ in rows} == {1, 2}


def test_every_row_of_a_partition_has_the_same_chance() -> None:
    counts = [[1, 50, 2], [0, 9, 0], [4, 0, 6]]
    drawn = Counter(row for rows in many(counts, 9, 2000) for row in rows if row[1] == 2)
    every = [drawn[rank, 2, i] for rank in range(3) for i in range(counts[rank][2])]
    assert equally_included(every, 2000, 3) > SIGNIFICANCE


# O(rows asked for)


def peak_bytes(stored: int, wanted: int) -> int:
    counts, requests = table([[stored], [0], [stored]]), np.array([wanted, wanted, 0])
    tracemalloc.start()
    try:
        draw(counts, requests, np.random.default_rng(0))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows_stored() -> None:
    few = peak_bytes(10_000, 5000)
    assert all(peak_bytes(10_000 * factor, 5000) <= 1.5 * few for factor in (10, 10**4, 10**8))


def test_memory_grows_with_the_rows_asked_for_at_most_linearly() -> None:
    assert peak_bytes(10**6, 40_000) <= 10 * peak_bytes(10**6, 5000)  # so few that both draw some row twice


@pytest.mark.parametrize("stored", [20_000, 10**6, 10**15])
def test_random_numbers_used_do_not_grow_with_the_rows_stored(stored: int) -> None:
    rng = generator(0, Purpose.DRAW, 0)
    draw(table([[stored]]), np.array([10_000]), rng)
    blocks = int(rng.bit_generator.state["state"]["counter"][0])
    assert 4 * blocks < 3 * 10_000  # 64-bit numbers


# choose


@pytest.mark.parametrize("wanted", [0, 1, 4, 5, 9, 10])
def test_choosing_never_repeats(wanted: int) -> None:
    segment, item = choose(np.array([10, 10]), np.array([wanted, 10 - wanted]), np.random.default_rng(0))
    pairs = list(zip(segment.tolist(), item.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == 10


def test_choosing_from_many_ranges_keeps_them_apart() -> None:
    """Every combination of a single and a pair out of ranges of 3 and 4: 3 x 6."""
    sizes, wanted = np.array([3, 4]), np.array([1, 2])
    drawn = []
    for seed in range(4000):
        segment, item = choose(sizes, wanted, np.random.default_rng(seed))
        drawn.append(frozenset(zip(segment.tolist(), item.tolist(), strict=True)))
    assert equally_likely(drawn, 18) > SIGNIFICANCE


def test_choosing_nothing_from_nothing() -> None:
    segment, item = choose(np.array([0]), np.array([0]), np.random.default_rng(0))
    assert (len(segment), len(item)) == (0, 0)
