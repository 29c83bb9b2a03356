"""Horovod: rows beside the gradients, through the same background thread of the same library.

Horovod agrees on the order of operations by their names, so every operation here has one. They are issued from
the training thread at a fixed point of the step: an operation of the user's without a name is numbered by the
order in which a process issues it, and a second thread would change that order. Waiting is polling:
`synchronize` on its own would spin, and this release gives no warning of a lost peer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.errors import ExchangeError, ExchangeTimeout, MissingDependencyError
from rehearsal_plugin.transport.base import Pending, Transport

__all__ = ["HorovodTransport", "horovod_failures"]

_names_in_use: set[str] = set()


class Enqueued:
    """An operation of Horovod in flight; keeps what it sends alive."""

    def __init__(self, hvd: Any, handle: int, sent: Tensor) -> None:
        self._hvd, self._handle, self._sent = hvd, handle, sent

    def done(self) -> bool:
        """See `Pending.done`."""
        return bool(self._hvd.poll(self._handle))

    def result(self) -> Tensor:
        """See `Pending.result`."""
        received = self._hvd.synchronize(self._handle)
        # An alltoall also tells how many rows came from whom; the plan knows that.
        rows: Tensor = received[0] if isinstance(received, tuple) else received
        return rows


class HorovodTransport(Transport):
    """Ranks of a Horovod process set.

    Several transports may live at once if all ranks make and close them in the same order.

    Args:
        process_set: The ranks that share the buffer, for a data-parallel subset; None for all.

    Raises:
        MissingDependencyError: Horovod is not installed.
        ExchangeError: `hvd.init()` was not called, or this rank is not in the process set.
    """

    main_thread = True

    def __init__(self, process_set: Any = None) -> None:
        self._hvd = _horovod()
        if not self._hvd.is_initialized():
            raise ExchangeError("Horovod is not initialised; call hvd.init() before the rehearsal is made")
        self._process_set = process_set or self._hvd.global_process_set
        if not self._process_set.included():
            raise ExchangeError(f"rank {self._hvd.rank()} is not in the process set {self._process_set}")
        self.rank, self.size = self._process_set.rank(), self._process_set.size()
        self._name = next(name for i in itertools.count() if (name := f"rehearsal.{i}") not in _names_in_use)
        _names_in_use.add(self._name)

    def all_gather(self, send: Tensor) -> Pending:
        """See `Transport.all_gather`."""
        sent = send[None]
        handle = self._hvd.allgather_async(sent, name=f"{self._name}.headers", process_set=self._process_set)
        return Enqueued(self._hvd, handle, sent)

    def all_to_all(self, send: Tensor, send_counts: list[int], recv: Tensor, recv_counts: list[int]) -> Pending:
        """See `Transport.all_to_all`; Horovod allocates what it receives, so `recv` stays as it is."""
        splits = torch.tensor(send_counts, dtype=torch.int32)
        handle = self._hvd.alltoall_async(send, splits, name=f"{self._name}.rows", process_set=self._process_set)
        return Enqueued(self._hvd, handle, send)

    def close(self) -> None:
        """See `Transport.close`."""
        _names_in_use.discard(self._name)
        self._name = "closed"


@contextmanager
def horovod_failures() -> Iterator[None]:
    """Raise an exchange that failed inside Horovod as Horovod's own error, which elastic jobs recover from."""
    from horovod.common.exceptions import HorovodInternalError

    try:
        yield
    except ExchangeError as error:
        if isinstance(error, ExchangeTimeout) or isinstance(error.__cause__, HorovodInternalError):
            raise HorovodInternalError(str(error)) from error
        raise


def _horovod() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise MissingDependencyError(
            "Horovod is not installed; build it against this PyTorch with scripts/install_horovod.sh"
        ) from error
    return hvd
