"""What a rank knows of the others, in groups and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.census import Census
from rehearsal_plugin.distributed.groups import RankGroup, rank_group
from rehearsal_plugin.distributed.header import Notes, Word
from rehearsal_plugin.distributed.header_round import Holdings
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.distributed.transport import LocalTransport, Pending, Transport
from rehearsal_plugin.errors import CheckpointError
from tests.helpers.thread_ranks import run_threads


def census_of(transport: Transport, scope: Any = 2, **sampling: Any) -> Census:
    keys = {"buffer": {"capacity": 8, "partition_by": "y"}, "ratio": 0.5, "sampling": {"scope": scope, **sampling}}
    config = RehearsalConfig.load(keys)
    return Census(rank_group(config, transport, transport.rank), config, 5, run=100 + transport.rank)


def words(pending: Pending) -> IntArray:
    assert pending.done(10.0)
    return pending.result().numpy()


def exchange(census: Census, step: int, rows: int, key: int = 0, losses: int = 0) -> None:
    holdings = Holdings(np.array([key]), np.array([rows]), None, settled=False)
    notes = Notes(losses_measured=losses)
    posted = census.post(step, Request(4), holdings, notes, census.mixture.proposed, None)
    census.hear(posted, step, words)


def known(transport: Transport) -> dict[str, Any]:
    census = census_of(transport)
    exchange(census, 0, rows=10 * (1 + transport.rank % 2), losses=transport.rank)
    return {
        "requests": census.requests(0).tolist(),
        "counts": census.table.counts[:, 0].tolist(),
        "share": census.group_share,
        "losses": census.notes[:, Word.LOSSES_MEASURED - Word.MIXTURE].tolist(),
        "run": census.run,
        "digest": census.digest,
    }


def test_the_table_is_that_of_the_group_and_the_notes_are_those_of_all() -> None:
    ranks = run_threads(known, 4)
    assert [rank["counts"] for rank in ranks] == [[10, 10], [20, 20]] * 2
    assert [rank["share"] for rank in ranks] == pytest.approx([2 / 3, 4 / 3] * 2)
    assert all(rank["losses"] == [0, 1, 2, 3] and rank["requests"] == [4, 4] for rank in ranks)
    assert {rank["run"] for rank in ranks} == {100}
    assert len({rank["digest"] for rank in ranks}) == 1


def changed_mixture(transport: Transport) -> list[Any]:
    """The weights in force after each exchange; ranks propose others one after the other."""
    census, in_force = census_of(transport, weights={"0": 1}), []
    for step in range(12):
        if step == transport.rank:
            census.mixture.propose({"0": 1, "1": 3})
        exchange(census, step, 10)
        in_force.append(census.mixture.in_force)
    return in_force


def test_another_mixture_is_in_force_in_all_groups_at_the_same_exchange() -> None:
    ranks = run_threads(changed_mixture, 4)
    assert all(rank == ranks[0] for rank in ranks)
    assert [len(weights) for weights in ranks[0]] == [1] * 3 + [2] * 9  # headers of all: 0, 1, 3 and 7


def goes_on(transport: Transport) -> bool:
    census, again = census_of(transport), census_of(transport)
    for step in range(3):
        exchange(census, step, 10 + transport.rank)
    again.load_state_dict(census.state_dict(), census.mixture.state_dict())
    return again.group_share == census.group_share and again.digest == census.digest


def test_a_census_goes_on_from_its_state() -> None:
    assert run_threads(goes_on, 4) == [True] * 4


def test_the_state_of_other_groups_is_refused_with_the_cure() -> None:
    config = RehearsalConfig.load({"buffer": {"capacity": 8}, "ratio": 0.5, "sampling": {"scope": "node"}})
    census = Census(RankGroup.of_all(LocalTransport()), config, 5, run=1)
    state = {**census.state_dict(), "groups": np.array([0, 1])}
    with pytest.raises(CheckpointError, match=r"in other groups.*set rehearsal\.sampling\.scope to another value"):
        census.load_state_dict(state, census.mixture.state_dict())


def weights_by_key(transport: Transport) -> dict[int, float]:
    """The groups hear of partition 9 first, and all ranks together of 3, so that tables differ in their order."""
    census = census_of(transport, weights={"3": 1.0, "9": 8.0})
    exchange(census, 0, rows=4, key=9 if transport.rank % 2 == 0 else 3)
    for step in (1, 2, 3):
        exchange(census, step, rows=4, key=3 if transport.rank % 2 == 0 else 9)
    return dict(zip(census.table.keys.tolist(), np.asarray(census.weights()).tolist(), strict=True))


def test_a_weight_stays_with_its_partition_where_tables_have_other_orders() -> None:
    for weights in run_threads(weights_by_key, 4):
        assert weights[9] == pytest.approx(8 * weights[3])
