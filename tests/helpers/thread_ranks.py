"""Ranks as threads of one process: cheap jobs of several ranks, with a transport that hands tensors over."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.transport import Transport

__all__ = ["ThreadTransport", "run_threads"]

DEADLINE_S = 120.0


class Meeting:
    """What the ranks send in one collective."""

    def __init__(self, size: int) -> None:
        self.sent: list[Any] = [None] * size
        self.all_there = threading.Event()
        self.missing = size
        self.lock = threading.Lock()

    def send(self, rank: int, value: Any) -> None:
        with self.lock:
            self.sent[rank] = value
            self.missing -= 1
            if not self.missing:
                self.all_there.set()


class Collective:
    """A collective in flight on one rank."""

    def __init__(self, meeting: Meeting, receive: Callable[[list[Any]], Tensor]) -> None:
        self._meeting, self._receive = meeting, receive

    def done(self, within_s: float = 0.0) -> bool:
        return self._meeting.all_there.wait(within_s)

    def result(self) -> Tensor:
        return self._receive(self._meeting.sent)


class Meetings:
    """The collectives of all groups of threads, by name of the group, channel and number."""

    def __init__(self) -> None:
        self._lock, self._meetings = threading.Lock(), dict[tuple[str, str, int], Meeting]()

    def of(self, name: str, channel: str, number: int, size: int) -> Meeting:
        with self._lock:
            return self._meetings.setdefault((name, channel, number), Meeting(size))


class ThreadTransport(Transport):
    """One of several ranks in a process; the n-th collective of a channel on one is the n-th on all."""

    def __init__(self, rank: int, meetings: Meetings, size: int, name: str = "all") -> None:
        self.rank, self.size, self._name = rank, size, name
        self._meetings = meetings
        self._numbers: defaultdict[str, int] = defaultdict(int)

    def all_gather(self, send: Tensor) -> Collective:
        return Collective(self._meet("headers", send.clone()), torch.stack)

    def all_to_all(
        self, send: Tensor, send_counts: IntArray, recv: Tensor, recv_counts: IntArray, *, channel: str = "rows"
    ) -> Collective:
        def receive(parts: list[list[Tensor]]) -> Tensor:
            return torch.cat([of_rank[self.rank] for of_rank in parts], out=recv)

        return Collective(self._meet(channel, list(torch.split(send.clone(), send_counts.tolist()))), receive)

    def split(self, groups: IntArray) -> ThreadTransport:
        ranks = np.flatnonzero(groups == groups[self.rank]).tolist()
        self._numbers["splits"] += 1
        name = f"{self._name}, {ranks} of split {self._numbers['splits']}"
        return type(self)(ranks.index(self.rank), self._meetings, len(ranks), name)

    def close(self) -> None:
        pass

    def _meet(self, channel: str, value: Any) -> Meeting:
        self._numbers[channel] += 1
        meeting = self._meetings.of(self._name, channel, self._numbers[channel], self.size)
        meeting.send(self.rank, value)
        return meeting


def run_threads(
    function: Callable[..., Any], size: int, *args: Any, kind: type[ThreadTransport] = ThreadTransport
) -> list[Any]:
    """Call `function(transport, *args)` on `size` threads, with transports of a `kind`; the results by rank."""
    meetings = Meetings()
    deadline = time.monotonic() + DEADLINE_S
    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(function, kind(rank, meetings, size), *args) for rank in range(size)]
        return [rank.result(max(0.0, deadline - time.monotonic())) for rank in ranks]
