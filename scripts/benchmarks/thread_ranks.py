"""Many ranks in one process: the real code of each, with rows that change hands in memory.

Each rank's exchange runs in its own worker thread, as in a job; one thread drives all training loops by turns. So a
hundred ranks and more can be had on a machine with few cores, without a process for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from threading import Condition
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.transport import Pending, Transport
from scripts.benchmarks.counting import CountsMessages

__all__ = ["CountingThread", "ThreadTransport", "counted_messages", "replayed_ids", "rows_of"]

Posts: TypeAlias = dict[int, Any]

TIMEOUT_S = 300.0
SETTLED_AFTER = 6
"""Steps after which ranks in groups have heard from all, and the rows that they asked for then have come."""


class Meeting:
    """Tensors that the ranks of one group send, collective by collective."""

    def __init__(self, size: int) -> None:
        self.size, self.posts, self.taken = size, dict[int, Posts](), Counter[int]()
        self.changed = Condition()
        self._parts: dict[tuple[int, ...], Meeting] = {}

    def part(self, ranks: tuple[int, ...]) -> Meeting:
        """The meeting of some of the ranks, the same for each of them."""
        with self.changed:
            return self._parts.setdefault(ranks, Meeting(len(ranks)))

    def post(self, number: int, rank: int, sent: Any) -> None:
        """Leave what a rank sends in the collective with this number."""
        with self.changed:
            self.posts.setdefault(number, {})[rank] = sent
            if len(self.posts[number]) == self.size:
                self.changed.notify_all()

    def complete(self, number: int, within_s: float) -> bool:
        """Whether all ranks have sent, waiting up to `within_s` for it."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.posts[number]) == self.size, within_s)

    def take(self, number: int) -> Posts:
        """Tensors of all ranks; dropped when the last rank has taken them."""
        with self.changed:
            self.taken[number] += 1
            done = self.taken[number] == self.size
            return self.posts.pop(number) if done else self.posts[number]


class Met:
    """A collective that is over when all ranks have come."""

    def __init__(self, meeting: Meeting, number: int, receive: Callable[[Posts], Tensor]) -> None:
        self._meeting, self._number, self._receive = meeting, number, receive

    def done(self, within_s: float = 0.0) -> bool:
        """See `Pending.done`."""
        return self._meeting.complete(self._number, within_s)

    def result(self) -> Tensor:
        """See `Pending.result`."""
        return self._receive(self._meeting.take(self._number))


class ThreadTransport(Transport):
    """One of the ranks of a meeting."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.size = rank, meeting.size
        self._meeting, self._number = meeting, 0

    @classmethod
    def group(cls, size: int) -> list[Self]:
        """The ranks of a new meeting."""
        meeting = Meeting(size)
        return [cls(meeting, rank) for rank in range(size)]

    def all_gather(self, send: Tensor) -> Pending:
        """See `Transport.all_gather`."""
        return self._issue(send.clone(), lambda posts: torch.stack([posts[rank] for rank in range(self.size)]))

    def all_to_all(
        self, send: Tensor, send_counts: IntArray, recv: Tensor, recv_counts: IntArray, *, channel: str = "rows"
    ) -> Pending:
        """See `Transport.all_to_all`."""

        def receive(posts: Posts) -> Tensor:
            torch.cat([posts[rank][self.rank] for rank in range(self.size)], out=recv)
            return recv

        return self._issue(torch.split(send.clone(), send_counts.tolist()), receive)

    def split(self, groups: IntArray) -> Self:
        """See `Transport.split`."""
        ranks = tuple(np.flatnonzero(groups == groups[self.rank]).tolist())
        return type(self)(self._meeting.part(ranks), ranks.index(self.rank))

    def close(self) -> None:
        """See `Transport.close`."""

    def _issue(self, sent: Any, receive: Callable[[Posts], Tensor]) -> Pending:
        self._number += 1
        self._meeting.post(self._number, self.rank, sent)
        return Met(self._meeting, self._number, receive)


class CountingThread(CountsMessages, ThreadTransport):
    """Ranks as threads whose messages are counted, those of their groups with them."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(meeting, rank)
        self._groups: list[CountingThread] = []

    def split(self, groups: IntArray) -> Self:
        """See `Transport.split`."""
        self._groups.append(super().split(groups))
        return self._groups[-1]  # type: ignore[return-value]

    @property
    def counted(self) -> int:
        """Messages of this transport and of the groups that it was split into."""
        return self.messages + sum(group.counted for group in self._groups)


def counted_messages(ranks: int, representatives: int, warmup: int, steps: int, scope: int | str) -> dict[str, Any]:
    """Messages of the busiest rank and collectives in a step, of ranks with full buffers that ask for the same rows."""
    config = {
        "buffer": {"capacity": 4},
        "representatives": representatives,
        "sampling": {"scope": scope},
        "exchange": {"timeout_s": TIMEOUT_S},
    }
    with ExitStack() as stack:
        transports = CountingThread.group(ranks)
        group = [stack.enter_context(Rehearsal(config, transport)) for transport in transports]
        before = [0] * ranks
        for step in range(warmup + steps):
            if step == warmup:
                group[0].drain()
                before = [transport.counted for transport in transports]
            for rank, rehearsal in enumerate(group):
                rehearsal.update(_batch(rank, sound=True))
        for rehearsal in group:
            rehearsal.drain()
        sent = [transport.counted - count for transport, count in zip(transports, before, strict=True)]
        return {"ranks": ranks, "scope": str(scope), "messages_max": max(sent) / steps}


def rows_of(rank: int) -> int:
    """Rows that a rank's buffer holds in `replayed_ids`: one to four, so that ranks differ."""
    return rank % 4 + 1


def replayed_ids(ranks: int, steps: int, representatives: int, **section: Any) -> tuple[Tensor, Mapping[str, float]]:
    """Rows that all ranks replay in `steps` steps from buffers that stay as they are.

    Every rank offers `rows_of(rank)` rows in its first step, and no sound row later.

    Returns:
        Their ids, `[rows]` int64, step by step and rank by rank, and the metrics of rank 0. Id 4 k + i is row i of
        rank k.
    """
    config = {"buffer": {"capacity": 4}, "representatives": representatives, "non_finite": "skip", **section}
    replayed = []
    with ExitStack() as stack:
        group = [stack.enter_context(Rehearsal(config, transport)) for transport in ThreadTransport.group(ranks)]
        for step in range(-SETTLED_AFTER, steps):
            first = step == -SETTLED_AFTER
            batches = [rehearsal.update(_batch(rank, first)) for rank, rehearsal in enumerate(group)]
            if step >= 0:
                replayed += [batch["id"][4:] for batch in batches]
        group[0].drain()
        return torch.cat(replayed), group[0].metrics()


def _batch(rank: int, sound: bool) -> dict[str, Tensor]:
    x = torch.full((4,), torch.nan)
    x[: rows_of(rank) * sound] = 1.0
    return {"x": x, "id": 4 * rank + torch.arange(4)}
