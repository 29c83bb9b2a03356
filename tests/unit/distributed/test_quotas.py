"""Shares of strata: exact in the mean for each reader, nearly exact for all together, and told for any reader alone."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.quotas import UNIT, Quotas, shifted_into
from tests.helpers.chance import SIGNIFICANCE, equally_likely

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)


def table(quotas: Quotas, readers: int, strata: int, draw_number: int = 0) -> IntArray:
    """Rows of each stratum by reader, `[readers, strata]`."""
    reader, stratum = (part.ravel() for part in np.indices((readers, strata)))
    return quotas.of(reader, np.full(len(reader), draw_number), stratum).reshape(readers, strata)


@PROPERTY
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.lists(st.integers(0, 30), min_size=1, max_size=7),
    st.booleans(),
    st.integers(0, 999),
)
def test_each_reader_gets_what_it_asks_for_of_strata_that_have_it(
    totals: list[int], requests: list[int], weighted: bool, seed: int
) -> None:
    held, rng = np.array(totals), np.random.default_rng(seed)
    asked = np.minimum(requests, held.sum()).reshape(-1, 1)
    if not asked.any():
        return
    quotas = Quotas(held, rng.random(len(held)) + 0.01 if weighted else None, asked, rng)
    rows = table(quotas, len(asked), len(held))
    assert rows.sum(axis=1).tolist() == asked[:, 0].tolist()
    assert (rows <= held).all()
    assert (rows <= quotas.most).all()


@PROPERTY
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.lists(st.integers(0, 30), min_size=1, max_size=40),
    st.integers(0, 999),
)
def test_candidates_are_all_readers_that_get_rows_and_few_others(
    totals: list[int], requests: list[int], seed: int
) -> None:
    held, rng = np.array(totals), np.random.default_rng(seed)
    asked = np.minimum(requests, held.sum()).reshape(-1, 1)
    if not asked.any():
        return
    quotas = Quotas(held, None, asked, rng)
    rows, strata = table(quotas, len(asked), len(held)), np.arange(len(held))
    entry, reader = quotas.candidates(strata, np.zeros_like(strata))
    pairs = set(zip(entry.tolist(), reader.tolist(), strict=True))
    assert len(pairs) == len(entry)
    assert {(stratum, reader) for reader, stratum in zip(*np.nonzero(rows), strict=True)} <= pairs


@pytest.mark.parametrize("reader", [0, 1, 4])
def test_odd_rows_go_to_every_stratum_with_the_same_chance(reader: int) -> None:
    picked = Counter[int]()
    for seed in range(3000):
        quotas = Quotas(np.array([50, 9, 1000, 4]), None, np.full((5, 1), 1), np.random.default_rng(seed))
        picked[int(table(quotas, 5, 4)[reader].argmax())] += 1
    assert equally_likely(picked.elements(), 4) > SIGNIFICANCE


def test_all_readers_together_have_the_shares_to_a_row() -> None:
    weights = np.array([3.0, 1.0, 0.7])
    for seed in range(50):
        quotas = Quotas(np.array([900, 900, 900]), weights, np.full((64, 1), 8), np.random.default_rng(seed))
        wanted = 64 * 8 * weights / weights.sum()
        assert np.abs(table(quotas, 64, 3).sum(axis=0) - wanted).max() < 8, "one for each whole line"


def test_two_draws_have_lines_of_their_own() -> None:
    quotas = Quotas(np.full(50, 9), None, np.full((3, 2), 5), np.random.default_rng(0))
    first, second = (table(quotas, 3, 50, number) for number in range(2))
    assert (first != second).any()


def shifts(space: int, readers: int) -> IntArray:
    return np.arange(readers) * max(1, space // readers) % space


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(-50, 150), st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(1, 70),
)
def test_hits_are_the_shifts_within_an_interval(intervals: list[tuple[int, int, int]], readers: int) -> None:
    begin, length, space = (np.array(column) for column in zip(*intervals, strict=True))
    length = np.minimum(length, space)
    number, reader = shifted_into(begin, length, space, readers)
    found = set(zip(number.tolist(), reader.tolist(), strict=True))
    assert len(found) == len(number)
    wanted = {
        (i, j)
        for i in range(len(begin))
        for j, shift in enumerate(shifts(int(space[i]), readers).tolist())
        if (shift - begin[i]) % space[i] < length[i]
    }
    assert found == wanted


def test_a_line_of_one_stratum_is_as_long_as_a_unit() -> None:
    number, reader = shifted_into(np.array([5]), np.array([UNIT]), np.array([UNIT]), 7)
    assert (number.tolist(), sorted(reader.tolist())) == ([0] * 7, list(range(7)))


def test_one_small_circle_does_not_make_the_others_dear() -> None:
    n, readers = 1000, 8192
    begin, length, space = np.zeros(n, dtype=np.int64), np.ones(n, dtype=np.int64), np.full(n, 1 << 20)
    space[7] = 1
    tracemalloc.start()
    number, _ = shifted_into(begin, length, space, readers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.count_nonzero(number == 7) == readers
    assert peak < 2e6  # it was hundreds of MB
