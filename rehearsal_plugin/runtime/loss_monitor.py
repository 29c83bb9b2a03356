"""Losses of new and of replayed rows, told apart in some of the steps, and what partitions count for in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import Float64Array, IntArray
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.token_losses import groups, predicts_next, token_losses
from rehearsal_plugin.strategies import Part
from rehearsal_plugin.strategies.base import Criterion

__all__ = ["LossMeter", "LossMonitor", "PartitionImportance"]


class LossMeter:
    """Weighted means by name, from one call of `close` to the next."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, kind: str, key: int | None, total: float, weight: float) -> None:
        """Add a sum of losses to `loss_<kind>`, and to that of the partition."""
        for name in (f"loss_{kind}", *([] if key is None else [f"loss_{kind}/{key}"])):
            sums, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = sums + total, weights + weight

    def total(self, kind: str, keys: list[int] | None = None) -> tuple[float, float]:
        """Sum and weight so far of a kind, or of some of its partitions."""
        names = [f"loss_{kind}"] if keys is None else [f"loss_{kind}/{key}" for key in keys]
        sums = [self._sums.get(name, (0.0, 0.0)) for name in names]
        return sum(total for total, _ in sums), sum(weight for _, weight in sums)

    def close(self) -> dict[str, float]:
        """The means by name; then it begins anew."""
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        self._sums.clear()
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

        def weighted(*_outputs_and_targets: object) -> Tensor:
            total = torch.zeros((), device="cpu")
            for _key, places in groups(keys, part.size):
                of_key = part.select(places)
                total = total + float(factors[places[0]]) * of_key.size * of_key.loss()
            return total / part.size

        return weighted


class LossMonitor:
    """Measures the micro-batches of every `losses_every`-th step.

    Args:
        config: The `rehearsal` section.
        coordinator: Knows the step, and tells the other ranks the measured losses.
        importance: What partitions count for; None where all rows count alike.
    """

    def __init__(
        self, config: RehearsalConfig, coordinator: ReplayCoordinator, importance: PartitionImportance | None
    ) -> None:
        self._every, self._coordinator, self._importance = config.losses_every, coordinator, importance
        self._guarded = None if config.guard is None else config.guard.partitions
        self._meter = LossMeter()

    @property
    def due(self) -> bool:
        """Whether this step is measured."""
        return self._every > 0 and self._coordinator.step % self._every == 0

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
                if of_key.size:
                    self._meter.add(kind, key, float(of_key.loss()) * of_key.size, of_key.size)

    def measure_outputs(self, micro_batch: MicroBatch, outputs: Any) -> Tensor | None:
        """Measure by the logits of a model that computes its own loss: a mean over the tokens of each partition.

        Args:
            micro_batch: Which; the batch has `labels`.
            outputs: With `loss` and `logits`.

        Returns:
            What importance adds to the model's loss; None for nothing.

        Raises:
            BatchError: There are no logits, no labels, or they do not fit together.
        """
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if micro_batch.labels is None or not isinstance(logits, Tensor):
            raise BatchError(
                "the losses of new and replayed rows are to be told apart (rehearsal.losses_every, "
                "rehearsal.strategy.partition_weights), and the model gave no 'logits', or the batch has no 'labels'; "
                "compute the loss with rehearsal.loss(criterion, outputs, *targets)"
            )
        labels = micro_batch.labels.to(logits.device)
        sums, counts = self._row_losses(logits, labels, micro_batch.new, shifted=predicts_next(outputs))
        if self.due:
            self._add(micro_batch, sums.detach().cpu(), counts.cpu())
        new, keys = micro_batch.new, micro_batch.keys
        if self._importance is None or keys is None or len(keys) == new:
            return None
        factors = torch.from_numpy(self._importance.factors(keys[new:])).to(sums)
        # The model's loss is the sum of all, whatever it was divided by.
        unit = outputs["loss"].detach() / sums.detach().sum().clamp_min(torch.finfo(sums.dtype).tiny)
        added: Tensor = unit * ((factors - 1) * sums[new:]).sum()
        return added

    def end_step(self) -> None:
        """Report the losses that were measured in this step."""
        if self.due:
            self._coordinator.losses.report(*self._meter.total("replayed", self._guarded))
            self._coordinator.metrics.losses = self._meter.close()

    def clear(self) -> None:
        """Forget what was measured in this step so far."""
        self._meter.close()

    def _row_losses(self, logits: Tensor, labels: Tensor, new: int, *, shifted: bool) -> tuple[Tensor, Tensor]:
        """See `token_losses`; with gradients for replayed rows only, and where they are weighted."""
        with torch.no_grad():
            of_new = token_losses(logits[:new], labels[:new], shifted=shifted)
        with torch.set_grad_enabled(self._importance is not None and torch.is_grad_enabled()):
            of_replayed = token_losses(logits[new:], labels[new:], shifted=shifted)
        return torch.cat((of_new[0], of_replayed[0])), torch.cat((of_new[1], of_replayed[1]))

    def _add(self, micro_batch: MicroBatch, sums: Tensor, counts: Tensor) -> None:
        for kind, rows in (("new", slice(micro_batch.new)), ("replayed", slice(micro_batch.new, None))):
            keys = None if micro_batch.keys is None else micro_batch.keys[rows]
            for key, places in groups(keys, len(sums[rows])):
                if len(places):
                    self._meter.add(kind, key, float(sums[rows][places].sum()), float(counts[rows][places].sum()))
