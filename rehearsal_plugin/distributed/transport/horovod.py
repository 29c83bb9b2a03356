"""Horovod: rows beside the gradients, through the same background thread of the same library.

Horovod agrees on the order of operations by their names, so every operation here has one. They are issued from
the training thread at a fixed point of the step: an operation of the user's without a name is numbered by the
order in which a process issues it, and a second thread would change that order. Waiting is polling:
`synchronize` on its own would spin, and this release gives no warning of a lost peer.

For the same reason all ranks must issue the same number of operations: groups of ranks (`split`) have headers and rows
in every exchange, whether or not they have news. Where only some ranks share a buffer, the
others either share one among themselves, or the script names its own operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.optional_import import optional_import
from rehearsal_plugin.distributed.transport.base import Pending, Refused, Transport, poll
from rehearsal_plugin.distributed.transport.horovod_start import StartWords
from rehearsal_plugin.errors import ClosedError, ConfigError, ExchangeError, ExchangeTimeout, RehearsalError

__all__ = ["HorovodTransport", "announcing_horovod_failure", "horovod_failures", "import_horovod"]

LINGER_S = 5.0
"""How long a rank that failed stays for others to hear of it, which may be behind."""


class Enqueued:
    """An operation of Horovod in flight; keeps what it sends alive, and fails where a rank failed before it began."""

    def __init__(self, hvd: Any, handle: int, sent: Tensor, start: StartWords | None) -> None:
        self._hvd, self._handle, self._sent, self._start = hvd, handle, sent, start

    def done(self, within_s: float = 0.0) -> bool:
        """See `Pending.done`."""
        return poll(self._ended, within_s)

    def _ended(self) -> bool:
        if self._start is not None:
            self._start.check()
        return bool(self._hvd.poll(self._handle))

    def result(self) -> Tensor:
        """See `Pending.result`."""
        received = self._hvd.synchronize(self._handle)
        # An alltoall also tells how many rows came from whom; the plan knows that.
        rows: Tensor = received[0] if isinstance(received, tuple) else received
        return rows


class HorovodTransport(Transport):
    """Ranks of a Horovod process set.

    Several transports may live at once if all ranks make them in the same order.

    Args:
        process_set: The ranks that share the buffer, for a data-parallel subset; None for all.

    Raises:
        MissingDependencyError: Horovod is not installed.
        ExchangeError: `hvd.init()` was not called, or this rank is not in the process set.

    Attributes:
        made: Transports that this process has made. It names the operations of the next one, which is why ranks
            of an elastic job agree on it when others join.
        sets_made: Process sets of groups, by their ranks.
    """

    main_thread = numbered = True
    made = 0
    sets_made: ClassVar[dict[tuple[int, ...], Any]] = {}

    def __init__(self, process_set: Any = None) -> None:
        self._hvd = import_horovod()
        if not self._hvd.is_initialized():
            raise ExchangeError("Horovod is not initialised; call hvd.init() before the rehearsal is made")
        self._process_set = process_set or self._hvd.global_process_set
        if not self._process_set.included():
            raise ExchangeError(f"rank {self._hvd.rank()} is not in the process set {self._process_set}")
        self.rank, self.size = self._process_set.rank(), self._process_set.size()
        self._name = self.next_name()
        self._start = StartWords(self._hvd, self._process_set, self._name)
        self._closed = False

    @classmethod
    def next_name(cls) -> str:
        """The name of the next transport, never used again: an operation that was given up may still be in flight."""
        cls.made += 1
        return f"rehearsal.{cls.made - 1}"

    @property
    def outdated(self) -> bool:
        """Whether Horovod has given the ranks other numbers since, as it does when an elastic job loses some."""
        return (self.rank, self.size) != (self._process_set.rank(), self._process_set.size())

    def all_gather(self, send: Tensor) -> Pending:
        """See `Transport.all_gather`."""
        return self._issue(self._hvd.allgather_async, send[None], what="headers")

    def all_to_all(
        self, send: Tensor, send_counts: IntArray, recv: Tensor, recv_counts: IntArray, *, channel: str = "rows"
    ) -> Pending:
        """See `Transport.all_to_all`; Horovod allocates what it receives, so `recv` stays as it is."""
        splits = torch.from_numpy(send_counts.astype(np.int32))
        return self._issue(self._hvd.alltoall_async, send, splits, what=channel)

    def split(self, groups: IntArray) -> Transport:
        """See `Transport.split`; all ranks make the process sets of all groups."""
        ranks = np.array(self._process_set.ranks)
        try:
            sets = [self._process_set_of(ranks[groups == number].tolist()) for number in range(int(groups.max()) + 1)]
        except ValueError as error:
            raise ConfigError(
                f"rehearsal.sampling.scope needs process sets, and Horovod makes none ({error}); set "
                "HOROVOD_DYNAMIC_PROCESS_SETS=1, or rehearsal.sampling.scope to 'global' or 'local'"
            ) from error
        return HorovodTransport(sets[int(groups[self.rank])])

    def close(self) -> None:
        """See `Transport.close`."""
        self._closed = True

    def _process_set_of(self, ranks: list[int]) -> Any:
        """The process set of `ranks`: Horovod has each of them once, so one that was made before is used again."""
        made = self.sets_made.get(tuple(ranks))
        if made is None or made.size() != len(ranks):  # of before Horovod was initialised anew
            made = self.sets_made[tuple(ranks)] = self._hvd.add_process_set(ranks)
        return made

    def _issue(self, operation: Callable[..., int], *tensors: Tensor, what: str) -> Pending:
        if self._closed:
            raise ClosedError("the transport was closed; make a new one to go on")
        try:
            handle = operation(*tensors, name=f"{self._name}.{what}", process_set=self._process_set)
        except Exception as error:
            return Refused(error)
        return Enqueued(self._hvd, handle, tensors[0], None if self._start.heard else self._start)


@contextmanager
def announcing_horovod_failure(process_set: Any) -> Iterator[None]:
    """Tell the ranks of a process set, which make their transport, of an error inside of the context."""
    try:
        yield
    except RehearsalError as error:
        hvd = import_horovod()
        if hvd.is_initialized() and process_set.included():
            failure = f"rank {hvd.rank()} failed before its first exchange with {type(error).__name__}: {error}"
            words = StartWords(hvd, process_set, HorovodTransport.next_name(), " ".join(failure.split()))
            with suppress(Exception):  # the error itself is what counts
                poll(words.ended, LINGER_S)
        raise


@contextmanager
def horovod_failures() -> Iterator[None]:
    """Raise an exchange that failed inside Horovod as Horovod's own error too, which elastic jobs recover from."""
    from horovod.common.exceptions import HorovodInternalError

    try:
        yield
    except RehearsalError as error:
        if isinstance(error, ExchangeTimeout) or isinstance(error.__cause__, HorovodInternalError):
            raise _as_horovods(type(error))(str(error)) from error  # type: ignore[arg-type]  # a class is hashable
        raise


@functools.cache
def _as_horovods(kind: type[RehearsalError]) -> type[RehearsalError]:
    """`kind` that is a `HorovodInternalError` as well."""
    from horovod.common.exceptions import HorovodInternalError

    return type(kind.__name__, (kind, HorovodInternalError), {"__module__": kind.__module__})


def import_horovod() -> Any:
    """The module `horovod.torch`.

    Raises:
        MissingDependencyError: Horovod is not installed.
    """
    hint = "build it for this PyTorch with scripts/install_horovod.sh"
    return optional_import("horovod.torch", name="Horovod", hint=hint)
