"""What the exchange needs of a communication library: headers of all, rows between some, and no call that waits."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin.config.registries import TRANSPORTS
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import ClosedError, ConfigError, ExchangeError, ExchangeTimeout

__all__ = ["Connect", "Pending", "Refused", "Transport", "poll", "register", "wait"]

FIRST_POLL_S = 50e-6

LOOK_S = 0.1
"""How long a library is waited for before deadlines and `stopped` are looked at again."""


class Pending(Protocol):
    """A collective that was issued and may not have ended."""

    def done(self, within_s: float = 0.0) -> bool:
        """Whether `result` returns without waiting, asked again for up to about `within_s` seconds."""

    def result(self) -> Tensor:
        """What was received; call it once, after `done`. Raises what the library raises."""


class Refused:
    """An operation that the library would not take, as after a rank was lost: fails where its result is waited for."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def done(self, within_s: float = 0.0) -> bool:
        """See `Pending.done`."""
        raise self._error

    def result(self) -> Tensor:
        """See `Pending.result`."""
        raise self._error


def poll(ended: Callable[[], bool], within_s: float) -> bool:
    """Ask a library that can only be asked, with pauses that grow with the time that has passed."""
    start = time.monotonic()
    while not ended():
        passed = time.monotonic() - start
        if passed >= within_s:
            return False
        time.sleep(min(max(FIRST_POLL_S, passed / 8), within_s - passed))
    return True


class Transport(ABC):
    """A group of ranks that exchange rows.

    All ranks issue the same collectives in the same order. Nothing here waits but `wait`, a little at a time and with
    a deadline, so that a lost peer can neither hang a rank nor keep its process from ending.

    Attributes:
        rank: This process in the group, from 0.
        size: Processes in the group.
        device: Where tensors given to `all_to_all` must live.
        main_thread: Whether collectives must be issued from the training thread because the library needs one
            order between them and the framework's own.
        numbered: Whether the library numbers the operations of a process, so that ranks of all groups must issue as
            many.
    """

    rank: int
    size: int
    device: torch.device = torch.device("cpu")
    main_thread: bool = False
    numbered: bool = False

    @property
    def outdated(self) -> bool:
        """Whether the ranks have other numbers since, as in an elastic job; then it can no longer be used."""
        return False

    @abstractmethod
    def all_gather(self, send: Tensor) -> Pending:
        """Gather a vector `[n]` int64 in host memory; the result is `[size, n]` int64 in host memory."""

    @abstractmethod
    def all_to_all(
        self, send: Tensor, send_counts: IntArray, recv: Tensor, recv_counts: IntArray, *, channel: str = "rows"
    ) -> Pending:
        """Send packed rows to their readers, with no message where there are no rows if the library can do that.

        Args:
            send: `[sum(send_counts), row_bytes]` uint8 on `device`, grouped by receiving rank.
            send_counts: `[size]` int64, rows for each rank.
            recv: `[sum(recv_counts), row_bytes]` uint8 on `device`, to be filled.
            recv_counts: `[size]` int64, rows from each rank.
            channel: Tells operations apart that are in flight at once, the same on all ranks.

        Returns:
            A pending result: the received rows grouped by sending rank, `recv` itself where the library allows.
            Both tensors must be left alone until then.
        """

    def describe_silent(self, step: int) -> str | None:
        """Who has not failed in the exchange of a step after this rank did; empty for nobody, None if it is not known.

        Takes some seconds: only a thread that nobody waits for may call it.
        """
        return None

    def split(self, groups: IntArray) -> Transport:
        """A transport of this rank's group; all ranks call it at once.

        Args:
            groups: `[size]` int64, the number of each rank's group, from 0. Ranks keep their order.

        Raises:
            ConfigError: There are no groups of ranks with this transport.
        """
        raise ConfigError(
            f"rehearsal.sampling.scope needs groups of ranks, and {type(self).__name__} makes none; set it to "
            "'global' or 'local'"
        )

    @abstractmethod
    def close(self) -> None:
        """Give up the group; a second call does nothing."""


Connect: TypeAlias = Callable[["dist.ProcessGroup | Sequence[int] | None", float], Transport]
"""`connect(group, timeout_s) -> transport`: between the ranks of a group of torch.distributed, or between ranks by
their numbers; None for all ranks."""


def register(name: str) -> Callable[[Connect], Connect]:
    """Make a transport available as `rehearsal.exchange.backend`; decorates the function that connects its ranks."""
    return TRANSPORTS.register(name)


def wait(pending: Pending, deadline: float, stopped: Callable[[], bool], what: str) -> Tensor:
    """Wait until a collective ends.

    Args:
        pending: The collective.
        deadline: `time.monotonic()` after which to give up.
        stopped: Asked every now and then; True gives up.
        what: Names the collective, the rank and the step in messages.

    Raises:
        ExchangeTimeout: The deadline passed.
        ExchangeError: The library reported a failure, such as a peer that is gone.
        ClosedError: `stopped` returned True.
    """
    while not _done(pending, min(LOOK_S, max(0.0, deadline - time.monotonic())), what):
        if stopped():
            raise ClosedError(f"{what} was given up because the rehearsal was closed")
        if time.monotonic() > deadline:
            raise ExchangeTimeout(
                f"{what} did not end in time: a rank is gone, stuck, or has taken another number of steps; "
                "see the other ranks' logs, or raise rehearsal.exchange.timeout_s if steps take that long"
            )
    try:
        return pending.result()
    except Exception as error:
        raise ExchangeError(f"{what} failed: {error}") from error


def _done(pending: Pending, within_s: float, what: str) -> bool:
    try:
        return pending.done(within_s)
    except Exception as error:
        raise ExchangeError(f"{what} failed: {error}") from error
