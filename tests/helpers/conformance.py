"""Conformance suite: facts that hold for every transport.

A transport joins by a factory that can be pickled: `check_facts(make)` runs on every rank of a job, makes a
transport for each fact, and says which facts do not hold there. The failures of a peer need a job each.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.transport import Pending, Transport, wait
from rehearsal_plugin.errors import ClosedError, ExchangeError, ExchangeTimeout

__all__ = ["DEADLINE_S", "FACTS", "Make", "check_facts", "gone_peer", "late_stop", "missing_peer"]

Make: TypeAlias = Callable[[], Transport]

DEADLINE_S = 1.5  # of a wait that must fail
PATIENCE_S = 20.0  # of a wait that must succeed


def finish(pending: Pending, what: str = "the exchange") -> Tensor:
    return wait(pending, time.monotonic() + PATIENCE_S, lambda: False, what)


def cargo(sender: int, receiver: int, rows: int, width: int = 16) -> Tensor:
    """Rows `[rows, width]` uint8 that only this pair would send."""
    generator = torch.Generator().manual_seed(1000 * sender + receiver)
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=generator)


def swap(transport: Transport, counts: Callable[[int, int], int]) -> tuple[Pending, Tensor]:
    """Send `counts(sender, receiver)` rows between all pairs; the pending result, and what it must be."""
    me, others = transport.rank, range(transport.size)
    send_counts, recv_counts = np.array([[counts(me, r), counts(r, me)] for r in others]).T
    send = torch.cat([cargo(me, r, n) for r, n in enumerate(send_counts)]).to(transport.device)
    recv = torch.full((int(recv_counts.sum()), 16), 7, dtype=torch.uint8, device=transport.device)
    expected = torch.cat([cargo(s, me, n) for s, n in enumerate(recv_counts)])
    return transport.all_to_all(send, send_counts, recv, recv_counts), expected


def ones(transport: Transport) -> IntArray:
    return np.ones(transport.size, dtype=np.int64)


def arrives(transport: Transport, counts: Callable[[int, int], int]) -> None:
    pending, expected = swap(transport, counts)
    assert torch.equal(finish(pending).cpu(), expected), "rows did not arrive grouped by sender, in order"


def headers_arrive(transport: Transport, start: int = 0) -> None:
    gathered = finish(transport.all_gather(torch.tensor([start, transport.rank, -(2**62) + transport.rank])))
    expected = torch.tensor([[start, r, -(2**62) + r] for r in range(transport.size)])
    assert gathered.device.type == "cpu", "headers are wanted in host memory"
    assert torch.equal(gathered, expected), f"headers came as {gathered.tolist()}"


def knows_its_place(transport: Transport) -> None:
    assert 0 <= transport.rank < transport.size
    headers_arrive(transport)


def even_splits(transport: Transport) -> None:
    arrives(transport, lambda sender, receiver: 3)


def uneven_splits(transport: Transport) -> None:
    arrives(transport, lambda sender, receiver: 1 + 2 * sender + 5 * receiver)


def zero_splits(transport: Transport) -> None:
    arrives(transport, lambda sender, receiver: 4 if (sender + receiver) % 2 else 0)


def one_rank_gives_all(transport: Transport) -> None:
    arrives(transport, lambda sender, receiver: 5 if sender == transport.size - 1 else 0)


def no_rows_at_all(transport: Transport) -> None:
    arrives(transport, lambda sender, receiver: 0)
    headers_arrive(transport)


def every_byte_value(transport: Transport) -> None:
    send = torch.arange(256, dtype=torch.uint8, device=transport.device).repeat(transport.size, 1)
    recv = torch.zeros_like(send)
    got = finish(transport.all_to_all(send, ones(transport), recv, ones(transport)))
    assert torch.equal(got.cpu(), send.cpu()), "a byte changed its value on the way"


def any_dtype_as_bytes(transport: Transport) -> None:
    for values in (
        torch.tensor([0.0, -0.0, 1.5, float("inf"), float("-inf"), float("nan")], dtype=torch.bfloat16),
        torch.tensor([True, False, False, True, True, False]),
        torch.tensor([1j, -2.5, 0, 3 + 4j, 5, 6], dtype=torch.complex128),
    ):
        row = values.view(torch.uint8)
        send = row.repeat(transport.size, 1).to(transport.device)
        recv = torch.zeros_like(send)
        got = finish(transport.all_to_all(send, ones(transport), recv, ones(transport))).cpu()
        assert all(torch.equal(r, row) for r in got), f"{values.dtype} changed on the way"


def large_rows(transport: Transport) -> None:
    send = torch.full((transport.size, 3_000_001), transport.rank + 1, dtype=torch.uint8, device=transport.device)
    recv = torch.zeros_like(send)
    got = finish(transport.all_to_all(send, ones(transport), recv, ones(transport)))
    assert [row.unique().tolist() for row in got.cpu()] == [[r + 1] for r in range(transport.size)]


def two_in_flight(transport: Transport) -> None:
    rows, expected = swap(transport, lambda sender, receiver: sender + receiver)
    headers = transport.all_gather(torch.tensor([transport.rank]))
    assert finish(headers).flatten().tolist() == list(range(transport.size)), "headers mixed up with rows"
    assert torch.equal(finish(rows).cpu(), expected), "rows mixed up with headers"


def many_in_a_row(transport: Transport) -> None:
    for step in range(30):
        rows, expected = swap(transport, lambda s, r, step=step: (s + r + step) % 4)  # type: ignore[misc]
        headers_arrive(transport, start=step)
        assert torch.equal(finish(rows).cpu(), expected), f"exchange {step} brought other rows"


def late_rank(transport: Transport) -> None:
    if transport.rank == 0:
        time.sleep(0.3)
    pending, expected = swap(transport, lambda sender, receiver: 2)
    if transport.rank == transport.size - 1 > 0:
        assert not pending.done(), "done before the last rank has begun"
    assert torch.equal(finish(pending).cpu(), expected)


def from_a_thread(transport: Transport) -> None:
    if transport.main_thread:
        return
    problems: list[BaseException] = []

    def exchange() -> None:
        try:
            many_in_a_row(transport)
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=exchange)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert not problems, f"in a thread: {problems}"


def closes_twice(transport: Transport) -> None:
    headers_arrive(transport)
    transport.close()
    transport.close()


FACTS: dict[str, Callable[[Transport], None]] = {
    fact.__name__: fact
    for fact in (
        knows_its_place,
        even_splits,
        uneven_splits,
        zero_splits,
        one_rank_gives_all,
        no_rows_at_all,
        every_byte_value,
        any_dtype_as_bytes,
        large_rows,
        two_in_flight,
        many_in_a_row,
        late_rank,
        from_a_thread,
        closes_twice,
    )
}


def check_facts(make: Make) -> dict[str, str]:
    """The facts that do not hold on this rank, with their tracebacks. Every fact gets a transport of its own."""
    broken = {}
    for name, fact in FACTS.items():
        try:
            transport = make()
            fact(transport)
            transport.close()
        except Exception:
            broken[name] = traceback.format_exc()
    return broken


def missing_peer(make: Make) -> str:
    """Rank 0 exchanges alone; the others are there and never join."""
    transport = make()
    headers_arrive(transport)
    if transport.rank:
        time.sleep(DEADLINE_S + 1)
        transport.close()
        return ""
    message = _fails_in_time(transport, ExchangeTimeout)
    started = time.monotonic()
    transport.close()
    assert time.monotonic() - started < 1, "close waited for a peer that never joined"
    return message


def gone_peer(make: Make, rank: int, how: str) -> str:
    """Rank 1 dies between two exchanges; `how` is "kill" or "exit"."""
    transport = make()
    headers_arrive(transport)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else os._exit(3)
    time.sleep(0.2)
    message = _fails_in_time(transport, ExchangeError)
    transport.close()
    return message


def late_stop(make: Make) -> float:
    """Seconds from a stop to the end of a wait that had 20 s left."""
    transport = make()
    headers_arrive(transport)
    if transport.rank:
        time.sleep(1.5)
        transport.close()
        return 0.0
    stopped: list[float] = []
    timer = threading.Timer(0.2, lambda: stopped.append(time.monotonic()))
    timer.start()
    with pytest.raises(ClosedError):
        wait(transport.all_gather(torch.zeros(1)), time.monotonic() + PATIENCE_S, lambda: bool(stopped), "headers")
    seconds = time.monotonic() - stopped[0]
    transport.close()
    return seconds


def _fails_in_time(transport: Transport, kind: type[ExchangeError]) -> str:
    """The message of the error of an exchange that cannot end."""
    what = f"the exchange on rank {transport.rank} at step 7"
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        wait(transport.all_gather(torch.zeros(1, dtype=torch.int64)), started + DEADLINE_S, lambda: False, what)
    assert time.monotonic() - started < DEADLINE_S + 0.5, "the deadline passed unseen"
    return str(caught.value)
