"""What ranks hold and want, as this rank knows it from headers: of those it draws from, and of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import Float64Array, IntArray
from rehearsal_plugin.distributed.global_counts import GlobalCounts, counts_partitions, least_pairs
from rehearsal_plugin.distributed.groups import GroupShares, RankGroup
from rehearsal_plugin.distributed.header import Headers, Notes, Word
from rehearsal_plugin.distributed.header_round import HeaderRound, Holdings
from rehearsal_plugin.distributed.header_schedule import HeaderSchedule
from rehearsal_plugin.distributed.mixture import Mixture, Weights
from rehearsal_plugin.distributed.opening import Opening
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.distributed.transport import Pending, Transport
from rehearsal_plugin.errors import CheckpointError

__all__ = ["Census", "PostedHeaders"]

ANY_REQUEST = Request(0, 0, 1)
NO_GROUPS: IntArray = np.empty(0, dtype=np.int64)

GROUPS_TOLD_EVERY = 16
"""Exchanges, at most, from one header of all ranks to the next where ranks draw in groups, until nothing changes."""


@dataclass(frozen=True)
class PostedHeaders:
    """The headers of an exchange in flight; None for those that it does not have.

    Attributes:
        of_group: Those of the ranks that draw from each other.
        of_all: Those of all ranks, where there are groups.
        proposed: The weights by partition that this rank wants; see `Mixture`.
    """

    of_group: Pending | None
    of_all: Pending | None
    proposed: Weights | None

    @property
    def count(self) -> int:
        """How many collectives they are."""
        return (self.of_group is not None) + (self.of_all is not None)


class Census:
    """Keeps the table of all ranks, and the mixture that they agree on.

    Args:
        group: The ranks.
        config: The `rehearsal` section.
        fingerprint: What ranks must have in common, see `header`.
        run: This rank's number for the run, see `Opening`.

    Attributes:
        mixture: The share of each partition.
    """

    def __init__(self, group: RankGroup, config: RehearsalConfig, fingerprint: int, run: int) -> None:
        self._group, self._config, self._by_partition = group, config, counts_partitions(config)
        self.mixture = Mixture(config.sampling)
        opening, everyone = Opening(config, run), group.everyone
        self._of_group = HeaderRound(
            group.transport,
            fingerprint,
            self._counts_of(group.transport),
            HeaderSchedule(always=everyone is not None and group.transport.numbered),
            opening if everyone is None else None,
            with_losses=everyone is None and config.follows_losses,
        )
        self._of_all, self._shares = self._of_group, None
        if everyone is not None:
            schedule = HeaderSchedule(GROUPS_TOLD_EVERY)
            self._of_all = HeaderRound(
                everyone,
                fingerprint,
                self._counts_of(everyone),
                schedule,
                opening,
                with_losses=config.follows_losses,
            )
            self._shares = GroupShares(group.numbers, everyone.rank)

    def post(
        self,
        step: int,
        request: Request,
        holdings: Holdings,
        notes: Notes,
        proposed: Weights | None,
        nearest: IntArray | None,
    ) -> PostedHeaders:
        """Issue the headers of an exchange, without waiting; see `HeaderRound.post`."""
        notes = replace(notes, mixture=Mixture.digest(proposed))
        if self._shares is None:
            return PostedHeaders(self._of_group.post(step, request, holdings, notes, nearest), None, proposed)
        of_group = self._of_group.post(step, request, holdings, Notes(), nearest)
        of_all = self._of_all.post(step, ANY_REQUEST, holdings, notes)
        return PostedHeaders(of_group, of_all, proposed)

    def hear(
        self, posted: PostedHeaders, step: int, wait: Callable[[Pending], IntArray]
    ) -> tuple[Headers | None, bool]:
        """Take in the headers of an exchange.

        Args:
            posted: They.
            step: Number of the exchange.
            wait: Gives the words of headers once they are there.

        Returns:
            The headers of the ranks that draw from each other, None in an exchange without; and whether another mixture
            is in force now.

        Raises:
            ExchangeError: A rank is at odds with this one.
        """
        headers = None if posted.of_group is None else self._of_group.hear(step, wait(posted.of_group))
        of_all = headers
        if self._shares is not None:
            of_all = None if posted.of_all is None else self._of_all.hear(step, wait(posted.of_all))
        changed = of_all is not None and self.mixture.agree(of_all.of(Word.MIXTURE), posted.proposed)
        if of_all is not None:
            self._share_among_groups()
        return headers, changed

    @property
    def table(self) -> GlobalCounts:
        """What the ranks hold that draw from each other."""
        return self._of_group.global_counts

    def requests(self, step: int) -> IntArray:
        """`[ranks]` int64, rows that each of these asks for in each draw."""
        return self._of_group.requests(step)

    def promised(self, step: int) -> int | None:
        """Rows that this rank must ask for in the exchange `step`, as it cannot tell the others; None if it can."""
        return self._of_group.promised(step)

    def is_silent(self, step: int) -> bool:
        """Whether the exchange `step` has no headers of these ranks."""
        return self._of_group.is_silent(step)

    @property
    def width(self) -> int | None:
        """Positions that rows of these ranks are packed with, as they told each other last; see `RowWidth`."""
        return self._of_group.width

    def weights(self) -> Float64Array | None:
        """The weight of each partition of the table in a draw; None where all count alike."""
        weights = self.mixture.weights(self.table.keys)
        if self._shares is None or not self._by_partition:
            return weights
        return self._shares.weights(self.table.keys, weights)

    @property
    def notes(self) -> IntArray:
        """`[ranks, NOTES]` int64, the words of other layers in the last headers of all ranks; see `header`."""
        return self._of_all.notes

    def take_losses(self) -> IntArray:
        """`[ranks, places, 5]` int64, the losses by partition in headers that came since; see `header`."""
        return self._of_all.take_losses()

    @property
    def group_share(self) -> float:
        """Times the rows that this rank asks for, see `GroupShares`; 1 where all ranks draw from each other."""
        return 1.0 if self._shares is None else self._shares.factor

    @property
    def digest(self) -> int:
        """A 32-bit number that is alike on all ranks."""
        return self._of_all.global_counts.digest

    @property
    def run(self) -> int | None:
        """The run of all ranks; None before the first exchange."""
        return self._of_all.run

    @run.setter
    def run(self, run: int) -> None:
        self._of_all.run = run

    def state_dict(self) -> dict[str, Any]:
        """What this rank knows of the others, as arrays and numbers."""
        of_group = self._of_group.state_dict()
        if self._shares is None:
            return of_group
        return {**of_group, "of_all": self._of_all.state_dict(), "groups": self._group.numbers}

    def load_state_dict(self, state: Mapping[str, Any], mixture: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on this rank of as many, and the state of the mixture.

        Raises:
            CheckpointError: Those were other groups of ranks.
            ValueError: Those were other ranks.
        """
        if not np.array_equal(state.get("groups", NO_GROUPS), self._group.numbers):
            raise CheckpointError(
                "its ranks drew from each other in other groups, as where nodes had other ranks; set "
                f"rehearsal.sampling.scope to another value than {self._config.sampling.scope!r} to share its rows out"
            )
        self.mixture.load_state_dict(mixture)
        self._of_group.load_state_dict(state)
        if self._shares is not None:
            self._of_all.load_state_dict(state["of_all"])
            self._share_among_groups()

    def _share_among_groups(self) -> None:
        if self._shares is not None:
            table = self._of_all.global_counts
            self._shares.update(table, self.mixture.weights(table.keys))

    def _counts_of(self, transport: Transport) -> GlobalCounts:
        by_stream = self._config.sampling.weights == "stream"
        return GlobalCounts(transport.rank, transport.size, least_pairs(self._config), with_offers=by_stream)
