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
from rehearsal_plugin.distributed.draw import Moves, draw, plan
from tests.helpers.chance import SIGNIFICANCE, equally_included, equally_likely
from tests.helpers.drawn_rows import numbers

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
Row = tuple[int, int, int]  # owner, partition, index

UNEQUAL = [[3], [0], [1], [40], [0], [6]]
"""Rows of six ranks in one partition; two ranks hold none."""


def table(counts: Sequence[Sequence[int]]) -> IntArray:
    return np.array(counts, dtype=np.int64).reshape(len(counts), -1)


def one(counts: Sequence[Sequence[int]], requests: Sequence[int], step: int = 0, stream: int = 0) -> list[Moves]:
    """What every rank sends and gets, each told by itself alone."""
    return [
        draw(table(counts), np.array(requests, dtype=np.int64), rank, numbers(step, rank, stream))
        for rank in range(len(counts))
    ]


def rows_of(ranks: Sequence[Moves], reader: int = 0) -> list[Row]:
    """The rows that a reader gets, as their owners send them."""
    rows = []
    for owner, moves in enumerate(ranks):
        sent = moves.reader == reader
        rows += [(owner, p, i) for p, i in zip(moves.partition[sent].tolist(), moves.index[sent].tolist(), strict=True)]
    return rows


def partitions_of(ranks: Sequence[Moves], reader: int = 0) -> list[int]:
    return [partition for _, partition, _ in rows_of(ranks, reader)]


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
    received = [len(rows_of(one(counts, requests), reader)) for reader in range(len(requests))]
    assert received == np.minimum(requests, np.sum(counts, dtype=np.int64)).tolist()


@PROPERTY
@given(situations())
def test_nobody_gets_a_row_twice(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    ranks = one(counts, requests)
    for reader in range(len(requests)):
        rows = rows_of(ranks, reader)
        assert len(set(rows)) == len(rows)


@PROPERTY
@given(situations())
def test_every_drawn_row_exists(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    for owner, moves in enumerate(one(counts, requests)):
        assert (moves.index >= 0).all()
        assert (moves.index < table(counts)[owner, moves.partition]).all()


@PROPERTY
@given(situations())
def test_partitions_give_equally_many_as_far_as_they_can(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    ranks, totals = one(counts, requests), table(counts).sum(axis=0)
    for reader in range(len(requests)):
        given_rows = np.bincount(np.array(partitions_of(ranks, reader), dtype=np.int64), minlength=len(totals))
        short = given_rows < given_rows.max(initial=0) - 1
        assert (given_rows[short] == totals[short]).all()


@PROPERTY
@given(situations(), st.integers(1, 3), st.integers(0, 99))
def test_each_rank_sends_what_the_others_expect(
    situation: tuple[list[list[int]], list[int]], draws: int, seed: int
) -> None:
    counts, requests = situation
    ranks, asked = len(requests), np.array(requests, dtype=np.int64)
    moves = [draw(table(counts), asked, rank, numbers(seed, rank), draws) for rank in range(ranks)]
    plans = [plan(each, ranks) for each in moves]
    sent = np.array([p.send_counts for p in plans])
    assert (sent == np.array([p.recv_counts for p in plans]).T).all()
    for owner, reader in np.ndindex(ranks, ranks):
        of_sender = np.sort(moves[owner].draw_number[moves[owner].reader == reader])
        of_reader = np.sort(moves[reader].received_draw[moves[reader].owner == owner])
        assert of_sender.tolist() == of_reader.tolist()


@PROPERTY
@given(situations())
def test_the_plans_move_exactly_the_drawn_rows(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    for moves in one(counts, requests):
        part = plan(moves, len(requests))
        readers = np.repeat(np.arange(len(requests)), part.send_counts)
        planned = sorted(zip(readers.tolist(), part.partition.tolist(), part.index.tolist(), strict=True))
        columns = (moves.reader, moves.partition, moves.index)
        assert planned == sorted(zip(*(column.tolist() for column in columns), strict=True))


@PROPERTY
@given(situations())
def test_all_ranks_know_how_many_rows_move(situation: tuple[list[list[int]], list[int]]) -> None:
    counts, requests = situation
    plans = [plan(moves, len(requests)) for moves in one(counts, requests)]
    assert {p.moved for p in plans} == {sum(int(p.send_counts.sum()) for p in plans)}


def test_the_same_seed_and_step_give_the_same_draw() -> None:
    first, again = (one(UNEQUAL, [5, 0, 9, 1, 2, 60], step=3) for _ in range(2))
    for mine, other in zip(first, again, strict=True):
        np.testing.assert_equal(vars(mine), vars(other))


def test_the_table_and_the_requests_are_left_as_they_were() -> None:
    counts, requests = table([[3, 1], [0, 9]]), np.array([4, 7])
    draw(counts, requests, 0, numbers(0))
    assert (counts.tolist(), requests.tolist()) == ([[3, 1], [0, 9]], [4, 7])


# Corners


@pytest.mark.parametrize(
    ("counts", "requests"),
    [([[0], [0]], [5, 5]), ([[], []], [5, 5]), ([[5], [5]], [0, 0])],
    ids=["no rows", "no partition", "nothing asked for"],
)
def test_an_empty_draw_makes_empty_plans(counts: list[list[int]], requests: list[int]) -> None:
    part = plan(one(counts, requests)[1], 2)
    assert (part.send_counts.tolist(), part.recv_counts.tolist(), part.moved) == ([0, 0], [0, 0], 0)
    assert len(part.index) == len(part.draw_numbers) == 0


def test_fewer_rows_than_asked_for_are_all_of_them() -> None:
    everything = [(rank, 0, i) for rank, (size,) in enumerate(UNEQUAL) for i in range(size)]
    assert sorted(rows_of(one(UNEQUAL, [1000, 0, 0, 0, 0, 0]))) == everything


def test_as_many_rows_as_asked_for_are_all_of_them() -> None:
    assert sorted(rows_of(one([[1, 2], [0, 1]], [4, 0]))) == [(0, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0)]


def test_the_only_row_goes_to_everyone() -> None:
    ranks = one([[0], [1], [0]], [1, 1, 7])
    assert [rows_of(ranks, reader) for reader in range(3)] == [[(1, 0, 0)]] * 3


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


@pytest.mark.parametrize("reader", [1, 2, 3])
def test_every_reader_has_every_set_with_the_same_chance(reader: int) -> None:
    draws = (frozenset(rows_of(one([[1], [0], [3], [2]], [2, 1, 2, 2], step), reader)) for step in range(4000))
    assert equally_likely(draws, 6 if reader == 1 else 15) > SIGNIFICANCE


def test_which_rows_of_an_owner_two_readers_get_is_independent() -> None:
    draws = (one([[4], [0]], [1, 1], step) for step in range(4000))
    assert equally_likely(((*rows_of(d, 0), *rows_of(d, 1)) for d in draws), 16) > SIGNIFICANCE


@pytest.mark.parametrize("ranks", [2, 16, 128])
def test_full_buffers_of_one_size_send_as_many_rows_each(ranks: int) -> None:
    requests = np.full(ranks, 7)
    for step in range(5):
        sent = [len(draw(np.full((ranks, 1), 90), requests, rank, numbers(step, rank)).index) for rank in range(ranks)]
        assert sent == [7] * ranks


def test_one_step_says_nothing_about_the_next() -> None:
    drawn = [rows_of(one([[2], [3]], [1, 0], step))[0] for step in range(4001)]
    assert equally_likely(pairwise(drawn), 25) > SIGNIFICANCE


def test_draws_of_the_own_rows_alone_differ_between_ranks() -> None:
    """`scope: local`: a table of one rank, and a stream of random numbers for each."""
    pairs = ((rows_of(one([[5]], [1], s, stream=1))[0], rows_of(one([[5]], [1], s, stream=2))[0]) for s in range(4000))
    assert equally_likely(pairs, 25) > SIGNIFICANCE


def test_a_million_million_rows_are_drawn_from_to_the_last() -> None:
    draws = (one([[10**12], [0], [3 * 10**12]], [1000, 0, 0], step)[0].owner for step in range(20))
    observed = np.bincount(np.concatenate(list(draws)), minlength=3)[[0, 2]]
    assert chi2_contingency([observed, [10**6, 3 * 10**6]]).pvalue > SIGNIFICANCE


# Balanced: an equal chance for every partition

SKEWED = [[1, 500, 20], [0, 500, 0], [0, 0, 80]]
"""Rows of three ranks in three partitions: 1, 1000 and 100."""


def test_equal_numbers_from_partitions_of_very_different_size() -> None:
    assert np.bincount(partitions_of(one([[10, 500, 20], [2, 500, 80]], [30, 0]))).tolist() == [10, 10, 10]


def test_a_small_partition_gives_all_and_the_others_the_rest() -> None:
    assert np.bincount(partitions_of(one(SKEWED, [21, 0, 0]))).tolist() == [1, 10, 10]


@pytest.mark.parametrize(("wanted", "cases"), [(1, 4), (3, 4), (5, 4), (6, 6), (7, 4)])
def test_odd_rows_go_to_partitions_at_random(wanted: int, cases: int) -> None:
    counts = [[50, 4, 1000, 9], [0, 4, 7, 3]]
    quotas = (tuple(sorted(Counter(p for _, p, _ in rows).items())) for rows in many(counts, wanted, 3000))
    assert equally_likely(quotas, cases) > SIGNIFICANCE


def test_odd_rows_of_all_readers_together_come_equally_from_all_partitions() -> None:
    for step in range(50):
        ranks = one([[9, 5, 30], [1, 0, 70], [3, 3, 3]], [1, 1, 1], step)
        assert sorted(partitions_of(ranks, 0) + partitions_of(ranks, 1) + partitions_of(ranks, 2)) == [0, 1, 2]


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
        draw(counts, requests, 0, numbers(0))
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
    used = numbers(0)
    draw(table([[stored]]), np.array([10_000]), 0, used)
    blocks = [int(rng.bit_generator.state["state"]["counter"][0]) for rng in (used.shared, used.own)]
    assert 4 * max(blocks) < 3 * 10_000  # 64-bit numbers


def test_the_work_of_a_rank_does_not_grow_with_the_ranks() -> None:
    """What is generated: random numbers and rows, counted; tables of all ranks are only summed."""
    used = []
    for ranks in (16, 16_384):
        source = numbers(3)
        moves = draw(np.full((ranks, 1), 1000), np.full(ranks, 8), ranks // 2, source)
        assert len(moves.reader) == len(moves.owner) == 8
        used.append(int(source.shared.bit_generator.state["state"]["counter"][0]))
    assert used[0] == used[1]
