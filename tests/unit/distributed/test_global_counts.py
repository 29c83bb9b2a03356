"""The table of counts that all ranks keep alike, by headers that they exchange."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.global_counts import GlobalCounts
from rehearsal_plugin.distributed.header import FIXED, Headers, Notes, Word, compose
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.errors import ExchangeError

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
FINGERPRINT = 2**63 - 1
KEYS = st.sampled_from([0, 1, 2, 3, 10, -7, 2**62, -(2**63)])
Stored = dict[int, int]  # rows by partition key


class Ranks:
    """The tables of several ranks, wired by hand: step by step, every rank gets all headers."""

    def __init__(self, size: int, pairs: int = 8) -> None:
        self.tables_of_ranks = [GlobalCounts(rank, size, pairs, pairs) for rank in range(size)]
        self.step = 0

    def headers(self, stored: list[Stored], requests: list[int] | None = None) -> IntArray:
        asked = requests or [0] * len(stored)
        return np.stack(
            [
                compose(FINGERPRINT, self.step, Request(request), changes, 0, Notes(), pairs, table.room)
                for table, request, rows in zip(self.tables_of_ranks, asked, stored, strict=True)
                for changes, pairs in [table.changes(*arrays(rows))]
            ]
        )

    def exchange(self, stored: list[Stored], requests: list[int] | None = None) -> list[IntArray]:
        """What every rank reads as the requests of all."""
        words = self.headers(stored, requests)
        self.step += 1
        headers = [Headers(words, table.room) for table in self.tables_of_ranks]
        for table, of_all in zip(self.tables_of_ranks, headers, strict=True):
            table.absorb(of_all)
        return [of_all.of(Word.REQUEST) for of_all in headers]

    def tables(self) -> list[list[Stored]]:
        """What every rank believes that every rank holds."""
        return [
            [{k: n for k, n in zip(table.keys.tolist(), row, strict=True) if n} for row in table.counts.tolist()]
            for table in self.tables_of_ranks
        ]


def arrays(stored: Stored) -> tuple[IntArray, IntArray]:
    return np.array(list(stored), dtype=np.int64), np.array(list(stored.values()), dtype=np.int64)


def without_zeros(stored: list[Stored]) -> list[Stored]:
    return [{key: size for key, size in rows.items() if size} for rows in stored]


@st.composite
def histories(draw: st.DrawFn) -> list[list[Stored]]:
    """What each of some ranks holds at every step; counts rise, fall and reach zero, partitions appear."""
    now: list[Stored] = [{} for _ in range(draw(st.integers(1, 4)))]
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        for rows in now:
            rows.update(draw(st.dictionaries(KEYS, st.integers(0, 9), max_size=4)))
        steps.append([dict(rows) for rows in now])
    return steps


# The table


@PROPERTY
@given(histories())
def test_all_ranks_know_what_all_ranks_hold_after_every_step(history: list[list[Stored]]) -> None:
    ranks = Ranks(len(history[0]))
    for stored in history:
        ranks.exchange(stored)
        assert ranks.tables() == [without_zeros(stored)] * len(stored)


@PROPERTY
@given(histories())
def test_all_ranks_number_the_partitions_alike(history: list[list[Stored]]) -> None:
    ranks = Ranks(len(history[0]))
    for stored in history:
        ranks.exchange(stored)
    assert len({tuple(table.keys.tolist()) for table in ranks.tables_of_ranks}) == 1
    assert all(table.counts.shape == (len(stored), len(table.keys)) for table in ranks.tables_of_ranks)


def test_requests_arrive_by_rank() -> None:
    assert [heard.tolist() for heard in Ranks(3).exchange([{}, {}, {}], [5, 0, 2**40])] == [[5, 0, 2**40]] * 3


def test_a_single_rank_knows_itself() -> None:
    ranks = Ranks(1, pairs=1)
    ranks.exchange([{0: 7}])
    assert ranks.tables() == [[{0: 7}]]


def test_nothing_stored_anywhere_is_an_empty_table() -> None:
    ranks = Ranks(2)
    ranks.exchange([{}, {}])
    assert [table.counts.shape for table in ranks.tables_of_ranks] == [(2, 0), (2, 0)]


# What travels


def test_what_did_not_change_does_not_travel() -> None:
    ranks = Ranks(2)
    ranks.exchange([{1: 5, 2: 6}, {3: 7}])
    assert ranks.headers([{1: 5, 2: 6}, {3: 7}])[:, Word.CHANGES].tolist() == [0, 0]


def test_only_what_changed_travels() -> None:
    ranks = Ranks(2)
    ranks.exchange([{1: 5, 2: 6, 3: 7}, {}])
    header = ranks.headers([{1: 5, 2: 0, 3: 7, -4: 1}, {}])[0]
    assert header[Word.CHANGES] == 2
    assert header[FIXED : FIXED + 4].tolist() == [2, 0, -4, 1]


def test_a_header_has_the_same_size_whatever_it_says() -> None:
    ranks = Ranks(2, pairs=8)
    assert [ranks.headers([rows, {}]).shape for rows in ({}, {1: 2})] == [(2, FIXED + 16)] * 2


def test_a_header_says_who_is_where() -> None:
    ranks = Ranks(1)
    ranks.step = 12
    assert ranks.headers([{}], [34])[0, :FIXED].tolist() == [FINGERPRINT, 12, 34, *[0] * (FIXED - 3)]


# More changes than a header has room for

MANY = {key: key + 1 for key in range(10)}


def test_a_rank_with_too_many_changes_is_left_out_of_one_draw() -> None:
    ranks = Ranks(2, pairs=4)
    ranks.exchange([MANY, {0: 3}])
    assert ranks.tables() == [[{}, {0: 3}]] * 2


def test_a_rank_with_too_many_changes_is_back_at_the_next_step() -> None:
    ranks = Ranks(2, pairs=4)
    for _ in range(2):
        ranks.exchange([MANY, {0: 3}])
    assert ranks.tables() == [[MANY, {0: 3}]] * 2


def test_a_rank_that_is_left_out_is_not_drawn_from_at_its_old_counts() -> None:
    """Rows that it no longer has could be asked for otherwise."""
    ranks = Ranks(2, pairs=10)
    ranks.exchange([MANY, {}])
    ranks.exchange([dict.fromkeys(MANY, 0) | dict.fromkeys(range(100, 110), 1), {}])
    assert ranks.tables() == [[{}, {}]] * 2


def test_a_rank_of_many_partitions_is_back_at_the_next_step_too() -> None:
    """All its counts have to travel anew, not only as many as changed when it was left out."""
    ranks, stored = Ranks(2, pairs=8), dict[int, int]()
    for start in range(0, 80, 8):
        stored.update(dict.fromkeys(range(start, start + 8), 1))
        ranks.exchange([dict(stored), {}])
    stored.update(dict.fromkeys(range(9), 2))
    for _ in range(2):
        ranks.exchange([dict(stored), {}])
    assert ranks.tables() == [[stored, {}]] * 2


def test_headers_stay_wide_enough_for_as_many_changes() -> None:
    ranks = Ranks(2, pairs=4)
    for factor in range(1, 5):
        ranks.exchange([{key: factor * size for key, size in MANY.items()}, {}])
    assert ranks.tables()[1][0] == {key: 4 * size for key, size in MANY.items()}


@PROPERTY
@given(histories(), st.integers(1, 3))
def test_narrow_headers_never_lead_to_a_wrong_count(history: list[list[Stored]], pairs: int) -> None:
    """A rank is either known as it is or left out, and known as it is once nothing changes any more."""
    ranks = Ranks(len(history[0]), pairs)
    for stored in history:
        ranks.exchange(stored)
        for table in ranks.tables():
            assert all(row in ({}, truth) for row, truth in zip(table, without_zeros(stored), strict=True))
    ranks.exchange(history[-1])
    assert ranks.tables() == [without_zeros(history[-1])] * len(history[-1])


@PROPERTY
@given(histories(), st.integers(1, 3))
def test_offers_are_known_wherever_rows_are(history: list[list[Stored]], room: int) -> None:
    """Ranks were offered 10 rows a step beyond those stored of each partition; rooms are powers of two."""
    ranks = len(history[0])
    tables = [GlobalCounts(rank, ranks, 2**room, 2**room, with_offers=True) for rank in range(ranks)]
    for step, stored in enumerate([*history, history[-1], history[-1]]):
        words = []
        for table, rows in zip(tables, stored, strict=True):
            keys, sizes = arrays(rows)
            changes, pairs = table.changes(keys, sizes, sizes + 10 * step)
            words.append(compose(FINGERPRINT, step, Request(0), changes, 0, Notes(), pairs, table.room))
        for table in tables:
            table.absorb(Headers(np.stack(words), table.room))
            for rank, rows in enumerate(stored):
                for key, size, offered in zip(table.keys.tolist(), table.counts[rank], table.offers[rank], strict=True):
                    assert not size or (size, offered) == (rows[key], rows[key] + 10 * step)
    held = without_zeros(history[-1])
    assert [{k: n for k, n in zip(tables[0].keys.tolist(), row, strict=True) if n} for row in tables[0].counts] == held


# Ranks at odds


def test_a_rank_at_another_step_is_named_with_both_steps() -> None:
    headers = Ranks(3).headers([{}, {}, {}])
    headers[2, Word.STEP] = 5
    with pytest.raises(ExchangeError, match=r"rank 0\b.*step 0\b.*rank 2\b.*step 5\b"):
        Headers(headers, 8).check(0)


def test_a_rank_with_other_fields_is_named() -> None:
    headers = Ranks(3).headers([{}, {}, {}])
    headers[1, Word.FINGERPRINT] = 99
    with pytest.raises(ExchangeError, match=r"rank 2\b.*rank 1\b.*fields, dtypes or shapes"):
        Headers(headers, 8).check(2)


def test_the_odd_one_out_raises_as_well() -> None:
    headers = Ranks(3).headers([{}, {}, {}])
    headers[1, Word.FINGERPRINT] = 99
    with pytest.raises(ExchangeError, match=r"rank 1\b.*rank 0\b"):
        Headers(headers, 8).check(1)
