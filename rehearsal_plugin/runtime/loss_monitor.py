"""Losses of new and of replayed rows, told apart in some of the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.importance import Importance
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.token_losses import LossMeter, groups, predicts_next, token_losses
from rehearsal_plugin.strategies import Part

__all__ = ["LossMonitor"]


class LossMonitor:
    """Measures the micro-batches of every `losses_every`-th step.

    Args:
        config: The `rehearsal` section.
        coordinator: Knows the step, and tells the other ranks what was measured.
        importance: What partitions count for; None where all rows count alike.
    """

    def __init__(self, config: RehearsalConfig, coordinator: ReplayCoordinator, importance: Importance | None) -> None:
        self._every, self._coordinator, self._importance = config.losses_every, coordinator, importance
        self._watched = None if config.guard is None else config.guard.partitions
        self._meter = LossMeter()

    @property
    def due(self) -> bool:
        """Whether this step is measured."""
        return self._every > 0 and self._coordinator.step % self._every == 0

    @torch.no_grad()
    def parts(self, micro_batch: MicroBatch, parts: Sequence[Part]) -> None:
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
                some = part.select(places)
                if some.size:
                    self._meter.add(kind, key, float(some.loss()) * some.size, some.size)

    def rows(self, micro_batch: MicroBatch, outputs: Any) -> Tensor | None:
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
        """Note what was measured in this step."""
        if self.due:
            self._coordinator.measured(*self._meter.total("replayed", self._watched))
            self._coordinator.metrics.losses = self._meter.close()

    def clear(self) -> None:
        """Forget what was measured in this step so far."""
        self._meter.close()

    def _row_losses(self, logits: Tensor, labels: Tensor, new: int, *, shifted: bool) -> tuple[Tensor, Tensor]:
        """See `token_losses`; with gradients for replayed rows only, and where they are weighted."""
        with torch.no_grad():
            fresh = token_losses(logits[:new], labels[:new], shifted=shifted)
        with torch.set_grad_enabled(self._importance is not None and torch.is_grad_enabled()):
            again = token_losses(logits[new:], labels[new:], shifted=shifted)
        return torch.cat((fresh[0], again[0])), torch.cat((fresh[1], again[1]))

    def _add(self, micro_batch: MicroBatch, sums: Tensor, counts: Tensor) -> None:
        for kind, part in _kinds(micro_batch.new):
            keys = None if micro_batch.keys is None else micro_batch.keys[part]
            for key, places in groups(keys, len(sums[part])):
                if len(places):
                    self._meter.add(kind, key, float(sums[part][places].sum()), float(counts[part][places].sum()))


def _kinds(new: int) -> Iterator[tuple[str, slice]]:
    yield "new", slice(new)
    yield "replayed", slice(new, None)
