"""Losses of new and of replayed rows, told apart in some of the steps, and what partitions count for in the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import Float64Array, IntArray
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.partition_losses import Tally
from rehearsal_plugin.runtime.sample_losses import SampleLosses
from rehearsal_plugin.runtime.token_losses import groups
from rehearsal_plugin.strategies import Part
from rehearsal_plugin.strategies.base import Criterion
from rehearsal_plugin.strategies.counted_loss import counted_loss, mean_over_rows

__all__ = ["LossMeter", "LossMonitor", "PartitionImportance"]


GOLDEN = 0x9E3779B1
"""Fibonacci hashing (Knuth, "The art of computer programming", volume 3, 6.4): multiples of it lie spread out."""


class LossMeter:
    """Weighted means by name, from one call of `close` to the next."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._rows: Counter[str] = Counter()
        self._keys: set[int] = set()

    def add(self, kind: str, key: int | None, total: float, weight: float, rows: int) -> None:
        """Add a sum of losses of rows to `loss_<kind>`, and to that of the partition."""
        if key is not None:
            self._keys.add(key)
            self._rows[f"loss_{kind}/{key}"] += rows
        for name in (f"loss_{kind}", *([] if key is None else [f"loss_{kind}/{key}"])):
            sums, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = sums + total, weights + weight

    def total(self, kind: str, keys: list[int] | None = None) -> tuple[float, float]:
        """Sum and weight so far of a kind, or of some of its partitions."""
        names = [f"loss_{kind}"] if keys is None else [f"loss_{kind}/{key}" for key in keys]
        sums = [self._sums.get(name, (0.0, 0.0)) for name in names]
        return sum(total for total, _ in sums), sum(weight for _, weight in sums)

    def by_partition(self) -> dict[int, Tally]:
        """What was measured of each partition."""
        return {
            key: Tally.measured(
                *self.total("replayed", [key]), self._rows[f"loss_replayed/{key}"], self._rows[f"loss_new/{key}"]
            )
            for key in sorted(self._keys)
        }

    def close(self) -> dict[str, float]:
        """The means by name; then it begins anew."""
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        self._sums.clear()
        self._rows.clear()
        self._keys.clear()
        return means


class PartitionImportance:
    """Importance weights w / q by partition.

    w is the weight that `strategy.partition_weights` gives a partition, q the share that it has had in the rows that
    were replayed so far, both among the partitions that are named and were replayed. So a partition counts by w,
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

        def weighted(outputs: Any, *targets: Tensor) -> Tensor:
            asked = replace(part, outputs=outputs, targets=targets)
            of_keys = (places for _key, places in groups(keys, part.size))
            return mean_over_rows((asked.select(places), float(factors[places[0]])) for places in of_keys)

        return weighted


class LossMonitor:
    """Measures the micro-batches of every `losses_every`-th step.

    Args:
        config: The `rehearsal` section.
        coordinator: Knows the step, and tells the other ranks the measured losses.
    """

    def __init__(self, config: RehearsalConfig, coordinator: ReplayCoordinator) -> None:
        self._every, self._coordinator = config.losses_every, coordinator
        self._varies = config.follows_losses
        self._guarded = None if config.guard is None else config.guard.partitions
        self._meter = LossMeter()

    @property
    def due(self) -> bool:
        """Whether this step is measured.

        Where the losses decide, it is another one in each block of `losses_every`: the steps in which rows are replayed
        come in a rhythm of their own, and those that are measured must not miss them for ever.
        """
        if not self._every:
            return False
        block, place = divmod(self._coordinator.step, self._every)
        return place == ((block * GOLDEN >> 16) % self._every if self._varies else 0)

    @torch.no_grad()
    def measure_parts(self, micro_batch: MicroBatch, parts: Sequence[Part]) -> None:
        """Measure by a loop's own criterion: a mean over the rows of each partition.

        Args:
            micro_batch: Which.
            parts: Its new rows, and those of each draw.
        """
        if not self.due:
            return
        kinds = ("new", *["replayed"] * (len(parts) - 1))
        for kind, part, keys in zip(kinds, parts, micro_batch.keys_by_part(), strict=True):
            for key, places in groups(keys, part.size):
                of_key = part.select(places)
                loss = counted_loss(of_key)
                if of_key.size and loss is not None:
                    self._meter.add(kind, key, float(loss) * of_key.size, of_key.size, of_key.size)

    def measure_samples(self, micro_batch: MicroBatch, losses: SampleLosses) -> None:
        """Measure by the tokens of a model that computes its own loss: a mean over the tokens of each partition."""
        if not self.due:
            return
        sums, counts = losses.sums.detach().cpu(), losses.counts.cpu()
        for kind, rows in (("new", slice(micro_batch.new)), ("replayed", slice(micro_batch.new, None))):
            keys = None if micro_batch.keys is None else micro_batch.keys[rows]
            for key, places in groups(keys, len(sums[rows])):
                if len(places):
                    total, weight = float(sums[rows][places].sum()), float(counts[rows][places].sum())
                    self._meter.add(kind, key, total, weight, len(places))

    def end_step(self) -> None:
        """Report the losses that were measured in this step."""
        if self.due:
            watched = self._meter.total("replayed", self._guarded)
            self._coordinator.losses.report(*watched, self._meter.by_partition())
            self._coordinator.metrics.losses = self._meter.close()

    def clear(self) -> None:
        """Forget what was measured in this step so far."""
        self._meter.close()
