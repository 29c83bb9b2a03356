"""Horovod's transport passes the conformance suite, and lives beside the user's own operations."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import Transport
from rehearsal_plugin.distributed.transport.horovod import HorovodTransport
from rehearsal_plugin.errors import ClosedError, ConfigError, ExchangeError
from tests.helpers import conformance
from tests.helpers.conformance import cargo
from tests.helpers.horovod_ranks import perform, run_horovod, try_horovod

pytest.importorskip("horovod.torch")
pytestmark = pytest.mark.horovod


def make() -> Transport:
    return HorovodTransport()


# --- facts, on two and three ranks -----------------------------------------------------------------------------------


def facts() -> dict[str, str]:
    return conformance.check_facts(make)


def among_the_users() -> list[bool]:
    """Exchanges with operations of the user's, without names, issued before, between and after ours."""
    import horovod.torch as hvd

    transport, right = HorovodTransport(), []
    expected = sum(range(hvd.size()))
    for step in range(40):
        first = hvd.allreduce_async(torch.tensor([hvd.rank()]), op=hvd.Sum) if step % 2 else None
        rows, wanted = conformance.swap(transport, lambda s, r, step=step: (s + r + step) % 3)  # type: ignore[misc]
        second = hvd.broadcast_async(torch.tensor([hvd.rank() + 5]), root_rank=1) if step % 3 else None
        headers = transport.all_gather(torch.tensor([transport.rank, step]))
        right.append(int(hvd.allreduce(torch.tensor([hvd.rank()]), op=hvd.Sum)) == expected)
        right.append(torch.equal(conformance.finish(rows), wanted))
        right.append(conformance.finish(headers).tolist() == [[r, step] for r in range(hvd.size())])
        right.append(first is None or int(hvd.synchronize(first)) == expected)
        right.append(second is None or int(hvd.synchronize(second)) == 6)
    transport.close()
    return right


def side_by_side() -> list[bool]:
    """Two transports at once, in flight together."""
    first, second = HorovodTransport(), HorovodTransport()
    right = []
    for step in range(10):
        pending = [conformance.swap(t, lambda s, r, step=step: 1 + (step + s) % 2) for t in (first, second)]  # type: ignore[misc]
        right += [torch.equal(conformance.finish(rows), wanted) for rows, wanted in pending]
    first.close()
    second.close()
    return right


def after_close() -> str:
    transport = HorovodTransport()
    transport.close()
    with pytest.raises(ClosedError) as caught:
        transport.all_gather(torch.zeros(1, dtype=torch.int64))
    return str(caught.value)


def of_a_set() -> dict[str, Any]:
    """Ranks 0 and 2 share a transport, rank 1 has its own; the user's operations go over all."""
    import horovod.torch as hvd

    sets = [HorovodTransport.sets_made[ranks] for ranks in ((0, 2), (1,))]  # of `in_groups`
    own = sets[hvd.rank() % 2]
    transport, sums, right = HorovodTransport(own), [], []
    for _ in range(10):
        send, width = [cargo(hvd.rank(), member, 2) for member in own.ranks], 16
        recv = torch.empty((2 * len(own.ranks), width), dtype=torch.uint8)
        counts = np.full(len(own.ranks), 2)
        rows = transport.all_to_all(torch.cat(send), counts, recv, counts)
        sums.append(int(hvd.allreduce(torch.tensor([hvd.rank()]), op=hvd.Sum)))
        expected = torch.cat([cargo(member, hvd.rank(), 2) for member in own.ranks])
        right.append(torch.equal(conformance.finish(rows), expected))
    place = transport.rank, transport.size
    transport.close()
    return {"place": place, "sums": sums, "right": right, "stranger": stranger(sets[1 - hvd.rank() % 2])}


def in_groups() -> list[int]:
    """Ranks whose rows this rank replays in a job in groups of two, of three ranks."""
    import horovod.torch as hvd

    section = {"buffer": {"capacity": 40}, "ratio": 0.5, "sampling": {"scope": 2}, "exchange": {"timeout_s": 30}}
    found: set[int] = set()
    for _ in range(2):  # the second job uses the process sets of the first
        with Rehearsal(section, make()) as rehearsal:
            for _ in range(20):
                batch = rehearsal.update({"rank": torch.full((8,), hvd.rank()), "x": torch.randn(8, 3)})
                found |= set(batch["rank"][8:].tolist())
    return sorted(found)


def stranger(process_set: Any) -> str:
    try:
        HorovodTransport(process_set)
    except ExchangeError as error:
        return str(error)
    return ""


def missing() -> tuple[float, str]:
    stopped = conformance.late_stop(make)
    return stopped, conformance.missing_peer(make)


SCENARIOS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (facts, among_the_users, side_by_side, after_close)}


@functools.cache
def outcomes(size: int) -> list[dict[str, Any]]:
    # What is missing comes last: it leaves an operation behind.
    scenarios = SCENARIOS | ({"in_groups": in_groups, "of_a_set": of_a_set} if size == 3 else {"missing": missing})
    return run_horovod(perform, size, scenarios, timeout_s=120, environment={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("fact", conformance.FACTS)
def test_conformance(size: int, fact: str) -> None:
    found = [rank["facts"] for rank in outcomes(size)]
    broken = {rank: facts[fact] for rank, facts in enumerate(found) if fact in facts}
    assert not broken, "\n".join(f"rank {rank}:\n{trace}" for rank, trace in broken.items())


@pytest.mark.parametrize("size", [2, 3])
def test_operations_without_a_name_are_never_stuck(size: int) -> None:
    assert all(all(rank["among_the_users"]) for rank in outcomes(size))


@pytest.mark.parametrize("size", [2, 3])
def test_two_transports_live_side_by_side(size: int) -> None:
    assert all(all(rank["side_by_side"]) for rank in outcomes(size))


def test_a_closed_transport_says_so() -> None:
    assert all("was closed" in rank["after_close"] for rank in outcomes(2))


def test_ranks_of_a_process_set_exchange_among_themselves() -> None:
    found = [rank["of_a_set"] for rank in outcomes(3)]
    assert [rank["place"] for rank in found] == [(0, 2), (0, 1), (1, 2)]
    assert all(rank["sums"] == [3] * 10 and all(rank["right"]) for rank in found)
    assert [f"rank {number} is not in the process set" in rank["stranger"] for number, rank in enumerate(found)] == [
        True
    ] * 3


def test_a_job_draws_in_groups_of_process_sets() -> None:
    assert [rank["in_groups"] for rank in outcomes(3)] == [[0, 2], [1], [0, 2]]


def without_dynamic_process_sets() -> str:
    with pytest.raises(ConfigError) as error:
        make().split(np.array([0, 1]))
    return str(error.value)


def test_groups_need_dynamic_process_sets_and_the_message_says_so() -> None:
    assert all("HOROVOD_DYNAMIC_PROCESS_SETS=1" in rank for rank in run_horovod(without_dynamic_process_sets, 2))


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_stop_ends_a_wait_and_a_missing_peer_is_a_timeout_that_names_rank_and_step() -> None:
    stopped, message = outcomes(2)[0]["missing"]
    assert stopped < 0.5
    assert "rank 0 at step 7" in message
    assert "rehearsal.exchange.timeout_s" in message


def gone() -> tuple[str, float]:
    import horovod.torch as hvd

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all ranks as soon as one has failed
    message = conformance.gone_peer(make, hvd.rank(), "kill")
    return message, time.time()


def test_a_peer_that_is_killed_is_an_error_and_the_process_ends() -> None:
    (survivor, victim), job = try_horovod(gone, 2, timeout_s=60)
    assert victim is None
    assert "rank 0 at step 7" in survivor[0]
    assert job.status == 1, job.printed
    assert not job.left
    assert time.time() - survivor[1] < 15, "the survivor hung at its exit"
    assert "terminate called" not in job.printed


def test_without_init_the_error_names_the_call() -> None:
    with pytest.raises(ExchangeError, match=r"hvd\.init"):
        HorovodTransport()
