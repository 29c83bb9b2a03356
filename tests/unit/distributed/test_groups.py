"""Ranks in groups: who draws from whom, and that the batch of all ranks together is unbiased all the same."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rehearsal_plugin import Rehearsal, RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed import groups
from rehearsal_plugin.distributed.global_counts import GlobalCounts
from rehearsal_plugin.distributed.groups import GroupShares, RankGroup, rank_group
from rehearsal_plugin.distributed.transport import LocalTransport, Transport
from rehearsal_plugin.errors import ConfigError
from scripts.benchmarks.thread_ranks import ThreadTransport
from tests.helpers.chance import SIGNIFICANCE
from tests.helpers.thread_ranks import run_threads

RANKS, GROUP = 128, 16


def config(scope: Any, **keys: Any) -> RehearsalConfig:
    return RehearsalConfig.load({"buffer": {"capacity": 8}, "ratio": 0.5, "sampling": {"scope": scope, **keys}})


def members(transport: Transport, scope: Any) -> tuple[int, int, int, list[int]]:
    group = rank_group(config(scope), transport, transport.rank)
    return group.transport.rank, group.transport.size, group.stream, group.numbers.tolist()


def test_neighbours_are_in_different_groups() -> None:
    ranks = run_threads(members, 6, 2)
    assert [rank[:3] for rank in ranks] == [(0, 2, 0), (0, 2, 1), (0, 2, 2), (1, 2, 0), (1, 2, 1), (1, 2, 2)]
    assert ranks[0][3] == [0, 1, 2, 0, 1, 2]


def test_groups_of_ranks_that_do_not_divide_are_of_nearly_one_size() -> None:
    ranks = run_threads(members, 7, 3)
    assert sorted(Counter(rank[2] for rank in ranks).values()) == [2, 2, 3]


@pytest.mark.parametrize("scope", ["global", 6, 100, "node"])
def test_a_group_of_all_ranks_is_the_global_draw(scope: Any) -> None:
    assert run_threads(members, 6, scope)[4] == (4, 6, 0, [])


def test_a_rank_alone_needs_no_group() -> None:
    assert members(LocalTransport(), 2) == (0, 1, 0, [])
    assert members(LocalTransport(), "local")[2] == 1


def on_a_node(transport: Transport) -> list[int]:
    return list(groups._by_node(transport, 10).tolist())


def test_nodes_are_told_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["b", "a", "b", "c", "a"])
    monkeypatch.setattr("socket.gethostname", lambda: next(names))
    found = run_threads(on_a_node, 5)
    assert all(rank == found[0] for rank in found)
    assert sorted(Counter(found[0]).values()) == [1, 2, 2]
    assert found[0][0] == 0


def test_a_transport_that_cannot_be_split_is_refused_by_name() -> None:
    class Whole(LocalTransport):
        size = 4

    with pytest.raises(ConfigError, match=r"sampling\.scope needs groups of ranks, and Whole makes none; set it to"):
        rank_group(config(2), Whole(), 0)


def counts(table: list[list[int]], keys: list[int]) -> GlobalCounts:
    known = GlobalCounts(0, len(table), 1)
    known.keys, known.counts = np.array(keys), np.array(table)
    return known


def test_groups_ask_in_proportion_to_what_they_hold() -> None:
    numbers = np.array([0, 1, 0, 1])
    factors = []
    for rank in range(4):
        shares = GroupShares(numbers, rank)
        assert shares.factor == 1
        shares.update(counts([[10], [60], [30], [60]], [0]), None)
        factors.append(shares.factor)
    assert factors == pytest.approx([0.5, 1.5, 0.5, 1.5])


def test_full_buffers_of_one_size_ask_alike_to_the_last_bit() -> None:
    shares = GroupShares(np.arange(99) % 3, 1)
    shares.update(counts([[77]] * 99, [0]), None)
    assert shares.factor == 1.0


def test_a_partition_that_one_group_holds_alone_comes_from_it_alone() -> None:
    """Balanced: half of the rows of all ranks are of key 5, which group 0 alone holds."""
    shares = GroupShares(np.array([0, 1]), 0), GroupShares(np.array([0, 1]), 1)
    for each in shares:
        each.update(counts([[10, 30], [0, 90]], [5, 7]), None)
    assert shares[0].factor == pytest.approx(2 * (1 + 0.25) / 2)
    assert shares[1].factor == pytest.approx(2 * 0.75 / 2)
    weights = shares[0].weights(np.array([7, 5, 6]), None)
    assert weights is not None
    assert weights.tolist() == [0.25, 1.0, 0.0]


def replay(rates: IntArray, steps: int, first: int, *, once: bool = False, **section: Any) -> list[tuple[int, int]]:
    """Rank and key of all rows that all ranks replay from step `first` on, where rank k offers `rates[k]` rows a step,
    or in the first one only.

    The key of a row is that of its rank's block of sixteen: neighbours see one domain.
    """
    section = {"representatives": 8, "non_finite": "skip", "exchange": {"timeout_s": 60}, **section}
    found = []
    with ExitStack() as stack:
        ranks = [stack.enter_context(Rehearsal(section, each)) for each in ThreadTransport.group(len(rates))]
        for step in range(-first, steps):
            for rank, rehearsal in enumerate(ranks):
                batch = {
                    "x": torch.where(torch.arange(4) < rates[rank] * (step == -first or not once), 1.0, torch.nan),
                    "rank": torch.full((4,), rank),
                    "key": torch.full((4,), rank // 16),
                }
                rows = rehearsal.update(batch)
                if step >= 0:
                    found += list(zip(rows["rank"][4:].tolist(), rows["key"][4:].tolist(), strict=True))
        ranks[0].drain()
    return found


def test_every_row_has_the_same_chance_in_groups_that_hold_more_or_less() -> None:
    """128 ranks in groups of 16: the buffers of the members of group g hold g % 4 + 1 rows each."""
    rates = np.arange(RANKS) % (RANKS // GROUP) % 4 + 1
    found = replay(rates, 40, 6, once=True, buffer={"capacity": 4}, sampling={"scope": GROUP})
    drawn = np.bincount([rank for rank, _ in found], minlength=RANKS)
    assert len(found) == pytest.approx(40 * 8 * RANKS, rel=0.01), "the mean of all ranks is what was asked for"
    assert chisquare(drawn, rates / rates.sum() * len(found)).pvalue > SIGNIFICANCE


def test_without_proportions_rows_of_small_groups_come_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupShares, "update", lambda *_: None)
    rates = np.arange(RANKS) % (RANKS // GROUP) % 4 + 1
    found = replay(rates, 10, 6, once=True, buffer={"capacity": 4}, sampling={"scope": GROUP})
    drawn = np.bincount([rank for rank, _ in found], minlength=RANKS)
    assert chisquare(drawn, rates / rates.sum() * len(found)).pvalue < SIGNIFICANCE


def test_groups_that_fill_at_different_speeds_have_their_share_all_the_while() -> None:
    rates = np.arange(RANKS) % (RANKS // GROUP) % 4 + 1
    found = replay(rates, 60, 20, buffer={"capacity": 1000}, sampling={"scope": GROUP})
    drawn = np.bincount([rank % 8 for rank, _ in found], minlength=8)
    assert drawn / drawn.sum() == pytest.approx(rates[:8] / rates[:8].sum(), abs=0.01)


@pytest.mark.parametrize("scope", ["global", GROUP])
def test_every_rank_with_a_full_buffer_gives_as_many_rows_as_it_gets(scope: Any) -> None:
    """So the share of each rank's data in a step has no variance, in groups as without."""
    found = replay(np.full(RANKS, 4), 10, 6, once=True, buffer={"capacity": 4}, sampling={"scope": scope})
    given = np.bincount([rank for rank, _ in found], minlength=RANKS)
    assert given.tolist() == [10 * 8] * RANKS


@pytest.mark.parametrize("weights", ["uniform", "balanced"])
def test_no_domain_is_lost_where_neighbours_see_the_same_one(weights: str) -> None:
    sampling, buffer = {"scope": GROUP, "weights": weights}, {"capacity": 4, "partition_by": "key"}
    found = Counter(key for _, key in replay(np.full(RANKS, 4), 20, 4, sampling=sampling, buffer=buffer))
    shares = np.array([found[key] for key in range(8)]) / found.total()
    assert shares == pytest.approx(np.full(8, 1 / 8), abs=0.02)


def test_a_group_holds_its_own_transport_only() -> None:
    class Closing(LocalTransport):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    own, everyone = Closing(), Closing()
    RankGroup(own, everyone, np.array([0]), 0).close()
    RankGroup.of_all(everyone).close()
    assert (own.closed, everyone.closed) == (1, 0)


def rows_with_many_partitions(transport: Transport) -> list[int]:
    """Replayed rows of each step, where each brings partitions that nobody has told of."""
    rng, replayed = np.random.default_rng(transport.rank), []
    keys = {"buffer": {"capacity": 2000, "partition_by": "y"}, "ratio": 0.25, "exchange": {"timeout_s": 30}}
    with Rehearsal({**keys, "sampling": {"weights": "balanced", "scope": 2}}, transport) as rehearsal:
        for _ in range(120):
            batch = {"x": torch.zeros(16, 1), "y": torch.from_numpy(rng.integers(0, 1000, 16))}
            replayed.append(len(rehearsal.update(batch)["y"]) - 16)
    return replayed


def test_groups_with_more_to_tell_than_headers_have_room_for_miss_single_draws_alone() -> None:
    for replayed in run_threads(rows_with_many_partitions, 4):
        assert replayed[3:].count(0) <= 5
