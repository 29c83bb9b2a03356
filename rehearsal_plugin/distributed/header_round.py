"""What the ranks of a transport tell each other in headers, and what each knows of all from the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.distributed.global_counts import GlobalCounts
from rehearsal_plugin.distributed.header import NOTES, PARTITION_WORDS, Headers, Notes, PartitionWord, Word, compose
from rehearsal_plugin.distributed.header_schedule import HeaderSchedule
from rehearsal_plugin.distributed.opening import Opening
from rehearsal_plugin.distributed.request import Request, requests_after
from rehearsal_plugin.distributed.transport import Pending, Transport

__all__ = ["HeaderRound", "Holdings"]


@dataclass(frozen=True)
class Holdings:
    """What a rank holds.

    Attributes:
        keys: `[p]` int64, its partitions.
        sizes: `[p]` int64, rows stored of each.
        offered: `[p]` int64, rows offered so far of each; None where that is not told.
        settled: Whether they stay as they are.
        width: Positions that its rows are packed with, at least; 0 where all have one length.
    """

    keys: IntArray
    sizes: IntArray
    offered: IntArray | None
    settled: bool
    width: int = 0


class HeaderRound:
    """The headers of one transport.

    After a load between two headers the first exchange has some that say no more than who this rank is: ranks at odds
    are refused at once, and a library that connects all ranks in their first operation (NCCL) finds them all.

    Args:
        transport: The ranks.
        fingerprint: What ranks must have in common, see `header`.
        counts: What all ranks of the transport hold.
        schedule: When there are headers.
        opening: What is told once; None where another round tells it.
        with_losses: Whether ranks tell each other losses by partition.

    Attributes:
        global_counts: As given.
        notes: `[ranks, NOTES]` int64, the words of the layers above in the last headers.
        width: Positions that the rows of all ranks were packed with, at least, in the last headers; None before, and
            after a load of what an earlier release saved.
        run: The run of all ranks; None before the opening.
    """

    def __init__(
        self,
        transport: Transport,
        fingerprint: int,
        counts: GlobalCounts,
        schedule: HeaderSchedule,
        opening: Opening | None = None,
        *,
        with_losses: bool = False,
    ) -> None:
        self._with_losses = with_losses
        self._transport, self._fingerprint, self._schedule = transport, fingerprint, schedule
        self.global_counts, self._opening = counts, opening
        self._has_met, self._heard_at = False, 0
        self._requests = np.zeros(transport.size, dtype=np.int64)
        self._rates = np.zeros((3, transport.size), dtype=np.int64)
        self.notes = np.zeros((transport.size, NOTES), dtype=np.int64)
        self._losses = self._no_losses = np.zeros((transport.size, 0, len(PartitionWord)), dtype=np.int64)
        self.run: int | None = None
        self.width: int | None = None

    def post(
        self, step: int, request: Request, holdings: Holdings, notes: Notes, nearest: IntArray | None = None
    ) -> Pending | None:
        """Gather the headers of all ranks, without waiting; None in an exchange without headers.

        Args:
            step: Number of the exchange.
            request: Rows that this rank asks for, as promised in an exchange without headers.
            holdings: What it holds.
            notes: The words of the layers above.
            nearest: The words of the nearest draw.
        """
        opening = None if self._opening is None else self._opening.words
        if not self._schedule.is_due(step):
            return None if self._has_met else self._greet(step, opening)
        changes, pairs = self.global_counts.changes(holdings.keys, holdings.sizes, holdings.offered)
        steady = holdings.settled and request.is_steady and nearest is None and not changes
        told = [request.numerator, request.denominator, holdings.width, *notes.words]
        promise, room = self._schedule.promise(step, told, steady=steady), self.global_counts.room
        if self._transport.size == 1 or changes > room:  # it costs nothing; or this rank is left out until it is heard
            promise = 0
        header = compose(
            self._fingerprint, step, request, changes, promise, notes, pairs, room, nearest, opening, holdings.width
        )
        return self._transport.all_gather(torch.from_numpy(header))

    def hear(self, step: int, words: IntArray) -> Headers | None:
        """Take in the headers of all ranks, `[ranks, words]` int64; None where they only say who the ranks are.

        Raises:
            ExchangeError: A rank is at odds with this one.
        """
        rank, is_due = self._transport.rank, self._schedule.is_due(step)
        room = self.global_counts.room if is_due else 0
        opening = 0 if self._opening is None else len(self._opening.words)
        headers = Headers(words, room, opening, PARTITION_WORDS if opening or self._with_losses else 0)
        if self._opening is not None:
            self.run, self._opening = self._opening.agree(headers.opening, rank), None
        headers.check(rank)
        self._has_met = True
        if not is_due:
            return None
        self.global_counts.absorb(headers)
        self._heard_at, self._requests, self.notes = step, headers.of(Word.REQUEST).copy(), headers.notes
        if self._with_losses:
            self._losses = headers.losses
        self._rates, self.width = headers.rates, int(headers.of(Word.WIDTH).max())
        self._schedule.agree(step, headers.of(Word.PROMISE))
        return headers

    def _greet(self, step: int, opening: IntArray | None) -> Pending:
        no_pairs: IntArray = np.empty((0, 2), dtype=np.int64)
        header = compose(self._fingerprint, step, Request(0), 0, 0, Notes(), no_pairs, 0, opening=opening)
        return self._transport.all_gather(torch.from_numpy(header))

    def take_losses(self) -> IntArray:
        """The losses by partition in headers that came since the last call, `[ranks, places, 5]` int64.

        There are no places where none came.
        """
        taken, self._losses = self._losses, self._no_losses
        return taken

    def requests(self, step: int) -> IntArray:
        """Rows that each rank asks for in the exchange `step`, `[ranks]` int64."""
        return self._requests if step == self._heard_at else requests_after(self._rates, step - self._heard_at)

    def is_silent(self, step: int) -> bool:
        """Whether the exchange `step` has no headers, so that ranks go by what they told each other before."""
        return not self._schedule.is_due(step)

    def promised(self, step: int) -> int | None:
        """Rows that the others know this rank to ask for in the exchange `step`; None where it can tell them."""
        return int(self.requests(step)[self._transport.rank]) if self.is_silent(step) else None

    def state_dict(self) -> dict[str, Any]:
        """What this rank knows of all."""
        requests = {"requests": self._requests, "rates": self._rates, "heard_at": self._heard_at}
        losses = {"losses": self._losses} if self._with_losses else {}
        known = {
            "notes": self.notes,
            "width": self.width,
            **losses,
            **requests,
            "schedule": self._schedule.state_dict(),
        }
        return {**self.global_counts.state_dict(), **known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on a rank of as many, or what an earlier release did.

        Raises:
            ValueError: Those were other ranks.
        """
        self.global_counts.load_state_dict(state)
        self.notes, self.width = state["notes"].copy(), state.get("width")
        if "losses" in state:
            self._losses = state["losses"].copy()
        if "schedule" in state:
            self._requests, self._rates = state["requests"].copy(), state["rates"].copy()
            self._heard_at = int(state["heard_at"])
            self._schedule.load_state_dict(state["schedule"])
