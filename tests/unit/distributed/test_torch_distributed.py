"""torch.distributed passes the conformance suite between real processes, and leaves the user's own group alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rehearsal_plugin.distributed.transport import TorchDistributedTransport, Transport
from rehearsal_plugin.errors import ClosedError, ConfigError, ExchangeError
from tests.helpers import conformance
from tests.helpers.exits import run_exits
from tests.helpers.ranks import run_ranks

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def gloo() -> Transport:
    return TorchDistributedTransport(backend="gloo", timeout_s=10.0)


def nccl() -> Transport:
    torch.cuda.set_device(dist.get_rank())
    return TorchDistributedTransport(backend="nccl", timeout_s=10.0)


@functools.cache
def facts_of(make: conformance.Make, size: int) -> list[dict[str, str]]:
    """What does not hold, by rank; one job for all facts."""
    return run_ranks(conformance.check_facts, size, make)


TRANSPORTS = [
    pytest.param(gloo, 2, id="gloo-2"),
    pytest.param(gloo, 4, id="gloo-4"),
    pytest.param(nccl, 2, id="nccl-2", marks=[gpu, needs_gpu]),
]


@pytest.mark.parametrize("fact", conformance.FACTS)
@pytest.mark.parametrize(("make", "size"), TRANSPORTS)
def test_conformance(make: conformance.Make, size: int, fact: str) -> None:
    broken = {rank: facts[fact] for rank, facts in enumerate(facts_of(make, size)) if fact in facts}
    assert not broken, "\n".join(f"rank {rank}:\n{trace}" for rank, trace in broken.items())


def test_a_peer_that_never_joins_is_a_timeout_that_names_rank_and_step() -> None:
    message = run_ranks(conformance.missing_peer, 2, gloo, timeout_s=30)[0]
    assert "rank 0 at step 7" in message
    assert "rehearsal.exchange.timeout_s" in message, "the message tells the cure"


def test_a_stop_ends_a_wait_at_once() -> None:
    assert run_ranks(conformance.late_stop, 2, gloo, timeout_s=30)[0] < 0.5


def between_collectives_of_the_user() -> None:
    transport = gloo()
    for step in range(20):
        pending, expected = conformance.swap(transport, lambda s, r, step=step: (s + r + step) % 3)  # type: ignore[misc]
        total = torch.tensor([float(dist.get_rank() + step)])
        dist.all_reduce(total)
        assert total.item() == 1 + 2 * step, "the user's own collective was disturbed"
        assert torch.equal(conformance.finish(pending), expected)
    transport.close()


def test_collectives_on_the_default_group_are_undisturbed() -> None:
    run_ranks(between_collectives_of_the_user, 2, timeout_s=30)


def made_again_and_again() -> tuple[int, int]:
    """Growth of open files and threads over 30 transports."""
    before = (0, 0)
    for turn in range(40):
        transport = gloo()
        conformance.headers_arrive(transport, start=turn)
        transport.close()
        if turn == 9:
            before = _resources()
    after = _resources()
    return after[0] - before[0], after[1] - before[1]


def _resources() -> tuple[int, int]:
    own = Path("/proc/self")
    return len(list((own / "fd").iterdir())), len(list((own / "task").iterdir()))


def test_transports_can_be_made_and_closed_many_times_without_a_leak() -> None:
    for files, threads in run_ranks(made_again_and_again, 2, timeout_s=60):
        assert files <= 2, "open files grew"
        assert threads <= 2, "threads grew"


def of_a_subgroup() -> list[int]:
    """Ranks 0, 2 and 1, 3 in a group each; what each rank gathers there."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    if rank == 3:
        dist.new_group([3], use_local_synchronization=True)  # groups of the user's own are not counted
    transport = TorchDistributedTransport(groups[rank % 2], timeout_s=10)
    gathered = conformance.finish(transport.all_gather(torch.tensor([rank])))
    transport.close()
    return [transport.rank, transport.size, *gathered.flatten().tolist()]


def test_ranks_of_a_subgroup_exchange_among_themselves() -> None:
    assert run_ranks(of_a_subgroup, 4, timeout_s=60) == [[0, 2, 0, 2], [0, 2, 1, 3], [1, 2, 0, 2], [1, 2, 1, 3]]


def split_in_two() -> list[int]:
    """What each rank gathers in its half, and whether rows arrive there."""
    transport = gloo()
    half = transport.split(np.arange(transport.size) % 2)
    conformance.uneven_splits(half)
    gathered = conformance.finish(half.all_gather(torch.tensor([dist.get_rank()])))
    conformance.headers_arrive(transport)
    half.close()
    transport.close()
    return [half.rank, half.size, *gathered.flatten().tolist()]


def test_a_transport_is_split_into_groups() -> None:
    assert run_ranks(split_in_two, 4, timeout_s=60) == [[0, 2, 0, 2], [0, 2, 1, 3], [1, 2, 0, 2], [1, 2, 1, 3]]


def lonely_transport() -> str:
    if dist.get_rank():
        time.sleep(2)
        return ""
    try:
        TorchDistributedTransport(timeout_s=0.5)
    except ExchangeError as error:
        return str(error)
    raise AssertionError("one rank alone made a transport of two")


def test_a_transport_that_only_one_rank_makes_is_an_error() -> None:
    assert "rank 0 of 2 could not connect" in run_ranks(lonely_transport, 2, timeout_s=30)[0]


def test_without_torch_distributed_the_error_names_the_call() -> None:
    with pytest.raises(ExchangeError, match="init_process_group"):
        TorchDistributedTransport()


def used_after_close() -> None:
    transport = gloo()
    transport.close()
    with pytest.raises(ClosedError):
        transport.all_gather(torch.zeros(1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_a_config_error() -> None:
    run_ranks(ask_for_nccl, 1)


def ask_for_nccl() -> None:
    with pytest.raises(ConfigError, match=r"rehearsal\.exchange\.backend"):
        TorchDistributedTransport(backend="nccl")
    used_after_close()


# Whole processes: what a shell sees at their end.


def exit_after_facts(rank: int) -> None:
    assert not conformance.check_facts(gloo)
    dist.destroy_process_group()


def exit_after_a_timeout(rank: int) -> None:
    conformance.missing_peer(gloo)
    dist.destroy_process_group()


def exit_after_a_killed_peer(rank: int) -> None:
    conformance.gone_peer(gloo, rank, "kill")
    dist.destroy_process_group()


def exit_after_a_dead_peer(rank: int) -> None:
    conformance.gone_peer(gloo, rank, "exit")
    dist.destroy_process_group()


def exit_after_a_stop(rank: int) -> None:
    conformance.late_stop(gloo)
    dist.destroy_process_group()


EXITS: dict[Callable[[int], None], list[int]] = {
    exit_after_facts: [0, 0],
    exit_after_a_timeout: [0, 0],
    exit_after_a_killed_peer: [0, -9],
    exit_after_a_dead_peer: [0, 3],
    exit_after_a_stop: [0, 0],
}


@functools.cache
def exits() -> dict[str, list[dict[str, Any]]]:
    return run_exits(EXITS)


@pytest.mark.parametrize("scenario", EXITS, ids=lambda scenario: scenario.__name__)
def test_the_process_ends_cleanly(scenario: Callable[[int], None]) -> None:
    ranks = exits()[scenario.__name__]
    assert [rank["code"] for rank in ranks] == EXITS[scenario], ranks
    assert not any("terminate called" in rank["stderr"] for rank in ranks), ranks
