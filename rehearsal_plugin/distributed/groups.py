"""Groups of ranks that draw from each other, so that an exchange costs the same however many ranks there are.

In data-parallel training the gradient is averaged over all ranks, so what must be unbiased is the batch of all ranks
together. It is, where each group asks for rows in proportion to what it holds. Three groups of two ranks, r = 4::

    rows stored            group 0: 100   group 1: 200   group 2: 300
    rows asked for a rank           2              4              6        4 in the mean, and 2 % of every group's rows

By partition, a group asks for rows of each in proportion to the group's part of that partition, times its weight. All
ranks tell each other now and then what they hold. Where the buffers of all groups hold as much, all ranks ask alike.
"""

from __future__ import annotations

import hashlib
import socket
import time
from dataclasses import dataclass

import numpy as np
import torch

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import Float64Array, IntArray
from rehearsal_plugin.distributed.global_counts import GlobalCounts
from rehearsal_plugin.distributed.transport import LocalTransport, Transport, wait

__all__ = ["GroupShares", "RankGroup", "rank_group"]


@dataclass(frozen=True)
class RankGroup:
    """The ranks that one rank draws from.

    Attributes:
        transport: Those.
        everyone: The ranks of all groups; None where there are no groups, but all ranks or this rank alone.
        numbers: `[ranks]` int64, the group of each rank of `everyone`; empty without.
        stream: Keys the draws of this group.
    """

    transport: Transport
    everyone: Transport | None
    numbers: IntArray
    stream: int

    @classmethod
    def of_all(cls, transport: Transport, stream: int = 0) -> RankGroup:
        """All ranks of a transport, which draw from each other."""
        return cls(transport, None, np.empty(0, dtype=np.int64), stream)

    def close(self) -> None:
        """Give up the group's own transport; that of all ranks stays."""
        if self.everyone is not None:
            self.transport.close()


def rank_group(config: RehearsalConfig, transport: Transport, rank: int) -> RankGroup:
    """The group of this rank by `rehearsal.sampling.scope`; all ranks call it at once where there are several groups.

    Args:
        config: The `rehearsal` section.
        transport: All ranks.
        rank: Of this process, for random numbers.

    Raises:
        ConfigError: The transport cannot be split.
        ExchangeError: A rank does not answer.
    """
    scope = config.sampling.scope
    if scope == "local":
        return RankGroup.of_all(LocalTransport(), rank + 1)
    if scope == "global" or transport.size == 1:
        return RankGroup.of_all(transport)
    numbers = _by_node(transport, config.exchange.timeout_s) if scope == "node" else _spread(transport.size, int(scope))
    if not numbers.any():
        return RankGroup.of_all(transport)
    number = int(numbers[transport.rank])
    return RankGroup(transport.split(numbers), transport, numbers, number)


class GroupShares:
    """How much this rank's group asks for, of all and of each partition.

    Args:
        numbers: `[ranks]` int64, the group of each rank.
        rank: This rank.

    Attributes:
        factor: Times the rows that a rank of this group asks for, where the mean of all ranks is 1.
    """

    def __init__(self, numbers: IntArray, rank: int) -> None:
        self._numbers, self._own = numbers, int(numbers[rank])
        self.factor = 1.0
        self._parts: dict[int, float] = {}  # the group's part of each partition key

    def update(self, table: GlobalCounts, weights: Float64Array | None) -> None:
        """Take what all ranks hold now, and the weight of each partition of the table; None where all count alike."""
        held = table.offers if table.offers.size else table.counts
        totals, own = held.sum(axis=0), held[self._numbers == self._own].sum(axis=0)
        parts = np.divide(own, totals, out=np.zeros(len(totals)), where=totals > 0)
        self._parts = dict(zip(table.keys.tolist(), parts.tolist(), strict=True))
        weights = (totals > 0).astype(np.float64) if weights is None else np.where(totals > 0, weights, 0.0)
        if weights.any():
            ranks, own_ranks = len(self._numbers), int(np.count_nonzero(self._numbers == self._own))
            self.factor = float((weights * parts).sum() * ranks / (weights.sum() * own_ranks))

    def weights(self, keys: IntArray, weights: Float64Array | None) -> Float64Array | None:
        """Weights `[n]` of partitions with `keys` `[n]` in the draws of this group; see `update`."""
        if not self._parts:
            return weights
        parts = np.array([self._parts.get(key, 0.0) for key in keys.tolist()])
        return parts if weights is None else parts * weights


def _spread(size: int, most: int) -> IntArray:
    """The group of each of `size` ranks, `[size]` int64, in groups of at most `most`; neighbours are in different ones.

    So a group has ranks of all nodes, and of all domains where neighbours see the same one. For 5 ranks in groups of 2:
    `[0, 1, 2, 0, 1]`.
    """
    return np.arange(size) % -(-size // most)


def _by_node(transport: Transport, timeout_s: float) -> IntArray:
    """The number of each rank's node, `[ranks]` int64, in the order of their first ranks."""
    name = hashlib.sha256(socket.gethostname().encode()).digest()
    mine = torch.tensor([int.from_bytes(name[:8], "little") >> 1], device="cpu")
    deadline = time.monotonic() + timeout_s
    names = wait(transport.all_gather(mine), deadline, lambda: False, f"the names of nodes on rank {transport.rank}")
    _, first, node = np.unique(names.numpy()[:, 0], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[node]
