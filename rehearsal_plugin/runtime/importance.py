"""What replayed rows of a partition count for in the loss, whatever share of the rows they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import Float64Array, IntArray
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.token_losses import groups
from rehearsal_plugin.strategies import Part
from rehearsal_plugin.strategies.base import Criterion

__all__ = ["Importance"]


class Importance:
    """Importance weights w / q by partition.

    w is the weight that `strategy.partition_weights` gives a partition, q the share that it has had in the rows that
    were replayed so far, both out of the partitions that are named and were replayed. So a partition counts by w,
    however seldom it is drawn. Partitions that are not named count as they come.

    Args:
        config: The `rehearsal` section.
        coordinator: Counts what is replayed.
    """

    def __init__(self, config: RehearsalConfig, coordinator: ReplayCoordinator) -> None:
        self._weights = {int(key): weight for key, weight in (config.strategy.partition_weights or {}).items()}
        self._coordinator = coordinator

    def factors(self, keys: IntArray) -> Float64Array:
        """By how much rows with `keys` `[n]` count, `[n]` float64; the rows themselves are counted already."""
        counts = self._coordinator.metrics.replayed_by_partition
        named = [key for key in self._weights if counts[key]]
        weight, rows = sum(self._weights[key] for key in named), sum(counts[key] for key in named)
        factor = {key: self._weights[key] * rows / (weight * counts[key]) if weight else 0.0 for key in named}
        distinct, places = np.unique(keys, return_inverse=True)
        return np.array([factor.get(key, 1.0) for key in distinct.tolist()], dtype=np.float64)[places]

    def criterion(self, part: Part, keys: IntArray) -> Criterion:
        """The criterion of a part with rows of partitions `keys` `[n]`, as a weighted mean over them."""
        factors = self.factors(keys)

        def weighted(*_given: object) -> Tensor:
            total = torch.zeros(())
            for _key, places in groups(keys, part.size):
                some = part.select(places)
                total = total + float(factors[places[0]]) * some.size * some.loss()
            return total / part.size

        return weighted
