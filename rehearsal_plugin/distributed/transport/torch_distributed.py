"""torch.distributed: gloo on any machine, NCCL between GPUs.

The transport makes a process group of its own. On the framework's group a second thread would mix its
collectives with the framework's, and ranks that issue them in different orders wait for each other for ever.
A group of its own is enough for gloo. NCCL wants one order between ALL communicators of a process, so there
collectives are issued from the training thread, on a side stream, and waited for elsewhere.

Rows go from rank to rank, and no message goes where no row does. (`alltoall_base` sends one to every rank.) The end of
a message between two ranks is waited for on a thread of its own: gloo takes a wait for it that ran out of time for the
end of the connection, so nobody could look at it now and then.

The group is built from the library's backend class. `dist.new_group` among the members alone names a group by
the number of groups alive, so that one made after another was closed would look for the closed one's sockets;
and `dist.destroy_process_group` waits for collectives that a lost peer will never complete.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.background_thread import BackgroundThread
from rehearsal_plugin.distributed.transport.base import Pending, Refused, Transport, poll, register
from rehearsal_plugin.distributed.transport.late_ranks import describe_silent
from rehearsal_plugin.distributed.transport.local import Finished, LocalTransport
from rehearsal_plugin.distributed.transport.start import next_store, ranks_of, wait_for_ranks
from rehearsal_plugin.errors import ClosedError, ConfigError, ExchangeError

__all__ = ["TorchDistributedTransport"]

LINGER_POLL_S = 0.1
CLOSE_WITHIN_S = 0.2
"""For messages that have arrived, or are about to; those of a lost peer end later, and the thread with them."""


class Issued:
    """A collective of torch.distributed in flight; keeps its tensors alive."""

    def __init__(self, work: dist.Work, received: Tensor, sent: Tensor) -> None:
        self._work, self._received, self._sent = work, received, sent

    def done(self, within_s: float = 0.0) -> bool:
        """See `Pending.done`."""
        if self._received.is_cuda:  # to wait there is to have the current stream wait
            return poll(self._work.is_completed, within_s)
        if within_s and not self._work.is_completed():
            # Out of time, or failed, which `result` tells: gloo says the same of both.
            with suppress(RuntimeError):
                # Without the GIL, and without looking again and again. Less than a millisecond would mean for ever.
                self._work.wait(timedelta(seconds=max(within_s, 1e-3)))
        return bool(self._work.is_completed())

    def result(self) -> Tensor:
        """See `Pending.result`."""
        self._work.wait()
        return self._received


class Messages:
    """Messages of gloo between ranks, waited for elsewhere; `job` holds all that they need until then."""

    def __init__(self, job: Future[None], received: Tensor) -> None:
        self._job, self._received = job, received

    def done(self, within_s: float = 0.0) -> bool:
        """See `Pending.done`."""
        return self._job.done() or bool(concurrent.futures.wait([self._job], within_s).done)

    def result(self) -> Tensor:
        """See `Pending.result`."""
        self._job.result()
        return self._received


class TorchDistributedTransport(Transport):
    """Ranks of a torch.distributed process group.

    Args:
        group: The ranks that share the buffer, usually the data-parallel group, or their numbers; None for all.
        backend: `"gloo"`, `"nccl"`, or `"auto"`: NCCL where the group's own backend is NCCL, else gloo.
        timeout_s: Seconds after which the library itself gives up; the exchange polls with its own deadline.

    Raises:
        ExchangeError: torch.distributed is not initialised, or a rank did not make its transport in time.
        ConfigError: The backend is not there.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | Sequence[int] | None = None,
        *,
        backend: str = "auto",
        timeout_s: float = 600.0,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ExchangeError(
                "torch.distributed is not initialised; call deepspeed.init_distributed() or "
                "torch.distributed.init_process_group() before the rehearsal is made"
            )
        backend, ranks = _resolve(backend, None if isinstance(group, Sequence) else group), ranks_of(group)
        self.size, self.rank = len(ranks), ranks.index(dist.get_rank())
        self._ranks, self._backend, self._timeout_s = ranks, backend, timeout_s
        self._group: Any = _connect(backend, ranks, self.rank, timedelta(seconds=2 * timeout_s))
        self._unfinished: list[dist.Work] = []
        self._waiter: BackgroundThread[None] | None = None  # until the first message
        self._stream: torch.cuda.Stream | None = None
        if backend == "nccl":
            self.main_thread = True
            self.device = torch.device("cuda", torch.cuda.current_device())
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def all_gather(self, send: Tensor) -> Pending:
        """See `Transport.all_gather`."""
        with self._side():
            sent = send.to(self.device, non_blocking=True)
            received = torch.empty((self.size, len(send)), dtype=send.dtype, device=self.device)
            work = self._open().allgather([list(received.unbind())], [sent])
        return Gathered(self._track(work), received, sent)

    def all_to_all(
        self, send: Tensor, send_counts: IntArray, recv: Tensor, recv_counts: IntArray, *, channel: str = "rows"
    ) -> Pending:
        """See `Transport.all_to_all`."""
        group, tag = self._open(), zlib.crc32(channel.encode()) >> 1
        outward, inward = dict(_parts(send, send_counts)), dict(_parts(recv, recv_counts))
        if not outward and not inward:
            return Finished(recv)
        if self._stream is not None:
            return self._send_coalesced(send, recv, outward, inward)
        if self.rank in outward:
            inward.pop(self.rank).copy_(outward.pop(self.rank))
        works, refused = list[dist.Work](), None
        try:
            works.extend(group.recv([rows], rank, tag) for rank, rows in inward.items())
            works.extend(group.send([rows], rank, tag) for rank, rows in outward.items())
        except RuntimeError as error:  # unlike a collective, a message to a rank that is gone fails at once
            refused = Refused(error)
        self._waiter = self._waiter or BackgroundThread(f"rehearsal-messages-rank{self.rank}")
        messages = Messages(self._waiter.submit(partial(_wait_for_all, group, works, send)), recv)
        return refused or messages

    def _send_coalesced(
        self, send: Tensor, recv: Tensor, outward: Mapping[int, Tensor], inward: Mapping[int, Tensor]
    ) -> Pending:
        """All messages as one operation of NCCL, those of this rank to itself among them."""
        group = self._open()
        with self._side():
            group._start_coalescing()
            for rank, rows in outward.items():
                group.send([rows], rank, 0)
            for rank, rows in inward.items():
                group.recv([rows], rank, 0)
            return Issued(self._track(group._end_coalescing()), recv, send)

    def split(self, groups: IntArray) -> Transport:
        """See `Transport.split`."""
        members = [self._ranks[rank] for rank in np.flatnonzero(groups == groups[self.rank]).tolist()]
        return TorchDistributedTransport(members, backend=self._backend, timeout_s=self._timeout_s)

    def describe_silent(self, step: int) -> str | None:
        """See `Transport.describe_silent`."""
        return describe_silent(self._ranks, self.rank, step)

    def close(self) -> None:
        """See `Transport.close`; does not wait for collectives in flight, and for messages at most `CLOSE_WITHIN_S`."""
        group, self._group = self._group, None
        if self._waiter is not None:
            self._waiter.close(CLOSE_WITHIN_S)
        unfinished = [work for work in self._unfinished if not work.is_completed()]
        self._unfinished = []  # finished ones hold the group's sockets too
        if unfinished:
            threading.Thread(target=_outlive, args=(group, unfinished), daemon=True).start()

    def _open(self) -> Any:
        if self._group is None:
            raise ClosedError("the transport was closed; make a new one to go on")
        return self._group

    def _track(self, work: dist.Work) -> dist.Work:
        self._unfinished = [earlier for earlier in self._unfinished if not earlier.is_completed()] + [work]
        return work

    def _side(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        # What was queued so far fills the rows to be sent.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)


def _connect_torch(backend: str, group: dist.ProcessGroup | Sequence[int] | None, timeout_s: float) -> Transport:
    """Ranks of torch.distributed if that is initialised, else this process alone.

    Raises:
        ConfigError: A launcher started several ranks, and they are not connected yet.
    """
    if dist.is_available() and dist.is_initialized():
        return TorchDistributedTransport(group, backend=backend, timeout_s=timeout_s)
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks.isdigit() and int(ranks) > 1:
        raise ConfigError(
            f"WORLD_SIZE is {ranks} and torch.distributed is not initialised, so each rank would replay its own rows "
            "alone; call torch.distributed.init_process_group() or deepspeed.init_distributed() before the rehearsal "
            "is made, or, where ranks are meant to stand alone, give Rehearsal(..., transport=LocalTransport())"
        )
    return LocalTransport()


for _name in ("auto", "gloo", "nccl"):
    register(_name)(partial(_connect_torch, _name))


class Gathered(Issued):
    """A gathered header; comes back to host memory."""

    def result(self) -> Tensor:
        """See `Pending.result`."""
        return super().result().cpu()


def _resolve(backend: str, group: dist.ProcessGroup | None) -> str:
    if backend == "auto":
        return "nccl" if "nccl" in str(dist.get_backend(group)) and torch.cuda.is_available() else "gloo"
    if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise ConfigError("rehearsal.exchange.backend is 'nccl' and this machine has no NCCL or no GPU; use 'gloo'")
    return backend


def _connect(backend: str, ranks: tuple[int, ...], rank: int, timeout: timedelta) -> Any:
    """A group of `ranks` that torch.distributed itself keeps no account of."""
    store = next_store(ranks)
    try:
        wait_for_ranks(store, len(ranks), timeout)
        if backend == "gloo":
            return dist.ProcessGroupGloo(store, rank, len(ranks), timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, len(ranks), options)
    except ExchangeError:
        raise
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {rank} of {len(ranks)} could not connect to the others within {timeout.total_seconds():g} s: "
            f"{error}; make the rehearsal on all ranks of the group, in the same order"
        ) from error


def _parts(rows: Tensor, counts: IntArray) -> Iterator[tuple[int, Tensor]]:
    """The ranks that have rows, and these; `counts` `[ranks]` int64 tells how many of the rows belong to each."""
    ends = counts.cumsum()
    for rank in np.flatnonzero(counts).tolist():
        yield rank, rows[int(ends[rank] - counts[rank]) : int(ends[rank])]


def _wait_for_all(group: Any, works: Sequence[dist.Work], sent: Tensor) -> None:
    """Wait for messages until the library gives up; group and tensor must live as long."""
    for work in works:
        work.wait()
    del group, sent


def _outlive(group: Any, unfinished: list[dist.Work]) -> None:
    """Keep a group until its collectives have ended, for its destructor would wait for them."""
    while not all(work.is_completed() for work in unfinished):
        time.sleep(LINGER_POLL_S)
