"""torch.distributed: gloo on any machine, NCCL between GPUs.

The transport makes a process group of its own. On the framework's group a second thread would mix its
collectives with the framework's, and ranks that issue them in different orders wait for each other for ever.
A group of its own is enough for gloo. NCCL wants one order between ALL communicators of a process, so there
collectives are issued from the training thread, on a side stream, and waited for elsewhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin.errors import ConfigError, ExchangeError
from rehearsal_plugin.transport.base import Pending, Transport

__all__ = ["TorchDistributedTransport"]


class Issued:
    """A collective of torch.distributed in flight; keeps its tensors alive."""

    def __init__(self, work: dist.Work, received: Tensor, sent: Tensor) -> None:
        self._work, self._received, self._sent = work, received, sent

    def done(self) -> bool:
        """See `Pending.done`."""
        return bool(self._work.is_completed())

    def result(self) -> Tensor:
        """See `Pending.result`."""
        self._work.wait()
        return self._received


class TorchDistributedTransport(Transport):
    """Ranks of a torch.distributed process group.

    Args:
        group: The ranks that share the buffer, usually the data-parallel group; None for all.
        backend: `"gloo"`, `"nccl"`, or `"auto"`: NCCL where the group's own backend is NCCL, else gloo.
        timeout_s: Seconds after which the library itself gives up; the exchange polls with its own deadline.

    Raises:
        ExchangeError: torch.distributed is not initialised.
        ConfigError: The backend is not there.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, backend: str = "auto", timeout_s: float = 60.0
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ExchangeError(
                "torch.distributed is not initialised; call deepspeed.init_distributed() or "
                "torch.distributed.init_process_group() before the rehearsal is made"
            )
        self._backend = _resolve(backend, group)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.size, self.rank = len(ranks), ranks.index(dist.get_rank())
        self._group: dist.ProcessGroup | None = dist.new_group(
            ranks,
            backend=self._backend,
            timeout=timedelta(seconds=2 * timeout_s),
            use_local_synchronization=True,
        )
        self._stream: torch.cuda.Stream | None = None
        if self._backend == "nccl":
            self.main_thread = True
            self.device = torch.device("cuda", torch.cuda.current_device())
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def all_gather(self, send: Tensor) -> Pending:
        """See `Transport.all_gather`."""
        with self._side():
            sent = send.to(self.device, non_blocking=True)
            received = torch.empty((self.size, len(send)), dtype=send.dtype, device=self.device)
            work = dist.all_gather(list(received.unbind()), sent, group=self._open(), async_op=True)
        return Gathered(work, received, sent)

    def all_to_all(self, send: Tensor, send_counts: list[int], recv: Tensor, recv_counts: list[int]) -> Pending:
        """See `Transport.all_to_all`."""
        with self._side():
            work = dist.all_to_all_single(recv, send, recv_counts, send_counts, group=self._open(), async_op=True)
        return Issued(work, recv, send)

    def close(self) -> None:
        """See `Transport.close`."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    def _open(self) -> dist.ProcessGroup:
        if self._group is None or not dist.is_initialized():
            raise ExchangeError("the process group of the rehearsal was destroyed; close the rehearsal first")
        return self._group

    def _side(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        # What was queued so far fills the rows to be sent.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)


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
