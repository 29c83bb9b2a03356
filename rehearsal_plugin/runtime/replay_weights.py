"""What replayed samples count for in a loss that a model computes itself, or in that of a criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.tree import map_leaves
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.loss_monitor import PartitionImportance
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.sample_losses import SampleLosses, fused_log_probs, weighted_log_probs
from rehearsal_plugin.runtime.term_gradient import TermGradients
from rehearsal_plugin.strategies import Part, Strategy
from rehearsal_plugin.strategies.base import Criterion, tensors_of

__all__ = ["ReplayWeights", "add_to_loss"]


class ReplayWeights:
    """The weights of `strategy.loss_weight`, `strategy.partition_weights` and `ratio.by`.

    Args:
        config: The `rehearsal` section.
        strategy: What replayed rows are used for.
        coordinator: Counts what is replayed.

    Attributes:
        importance: What partitions count for; None where all rows count alike.
        controlled: Whether what a replayed row counts for is raised and lowered while the job runs.

    Raises:
        ConfigError: It is to be, and the strategy's loss has no weight for replayed rows.
    """

    def __init__(self, config: RehearsalConfig, strategy: Strategy, coordinator: ReplayCoordinator) -> None:
        self._config, self._strategy, self._coordinator = config, strategy, coordinator
        budget = config.ratio_budget
        self.controlled = budget is not None and budget.by != "ratio"
        if self.controlled and strategy.replayed_weight is None and config.strategy.name != "er-ace":
            raise ConfigError(
                f"rehearsal.ratio.by changes what replayed rows count for in the task's loss, and strategy "
                f"'{config.strategy.name}' has no such weight; set it to 'ratio', or use strategy 'er'"
            )
        by_partition = config.strategy.partition_weights is not None
        self.importance = PartitionImportance(config, coordinator) if by_partition else None

    @property
    def constant(self) -> float:
        """What each replayed sample counts for, its partition aside."""
        weight = self._strategy.replayed_weight
        return (1.0 if weight is None else weight) * self._coordinator.losses.loss_weight

    @property
    def subject(self) -> str:
        """Which part of the section makes the loss another one than the model's, for a message."""
        if self.constant != 1:
            return "rehearsal.ratio.by" if self.controlled else "rehearsal.strategy.loss_weight"
        weights = self._strategy.plain and self.importance is not None
        return "rehearsal.strategy.partition_weights" if weights else f"strategy '{self._config.strategy.name}'"

    def factors(self, micro_batch: MicroBatch) -> Tensor | None:
        """What each replayed sample counts for, `[replayed]` float64; None where all count 1."""
        replayed = sum(micro_batch.sizes) - micro_batch.new
        keys = None if self.importance is None else micro_batch.keys
        if not replayed or (self.constant == 1 and keys is None):
            return None
        factors = torch.full((replayed,), self.constant, dtype=torch.float64, device="cpu")
        if self.importance is not None and keys is not None:
            factors *= torch.from_numpy(self.importance.factors(keys[micro_batch.new :]))
        return factors

    def weigh_parts(self, micro_batch: MicroBatch, replayed: Sequence[Part]) -> list[Part]:
        """Replayed parts with rows whose loss counts by the importance of their partition, and by the budget.

        Raises:
            ConfigError: The strategy has no loss on replayed rows.
        """
        factor = self._coordinator.losses.loss_weight
        if factor != 1:
            replayed = [replace(part, criterion=_times(factor, part.criterion)) for part in replayed]
        if self.importance is None:
            return list(replayed)
        if not self._strategy.relearns:
            raise ConfigError(
                f"rehearsal.strategy.partition_weights weighs the task's loss on replayed rows, and strategy "
                f"'{self._config.strategy.name}' has none; use another strategy, or leave the weights out"
            )
        keys = [keys for keys, size in zip(micro_batch.keys_by_part()[1:], micro_batch.sizes[1:], strict=True) if size]
        return [
            part if of_part is None else replace(part, criterion=self.importance.criterion(part, of_part))
            for part, of_part in zip(replayed, keys, strict=True)
        ]

    def weigh_outputs(
        self, micro_batch: MicroBatch, outputs: Any, losses: SampleLosses, factors: Tensor, terms: TermGradients
    ) -> Any:
        """The outputs of a model with a loss, or with log-probabilities, in which samples count by `factors`.

        Args:
            micro_batch: Which.
            outputs: As for `sample_losses`.
            losses: Of the samples.
            factors: From `factors`.
            terms: Told what is to reach a gradient.
        """
        fused = fused_log_probs(outputs)
        if fused is None:
            sums, factors = losses.sums, factors.to(losses.sums)
            # The model's loss is the sum of all, whatever it was divided by.
            unit = outputs["loss"].detach() / sums.detach().sum().clamp_min(torch.finfo(sums.dtype).tiny)
            added = unit * ((factors - 1) * sums[micro_batch.new :]).sum()
            terms.watch(added, tensors_of(outputs).values())
            return add_to_loss(outputs, added)
        log_probs, weighted = weighted_log_probs(micro_batch, fused[0], factors.to(fused[0]))
        terms.watch(weighted, [fused[0]])
        return map_leaves(outputs, lambda name, value: log_probs if name == "log_probs" else value)


def _times(factor: float, criterion: Criterion) -> Criterion:
    return lambda *outputs_and_targets: factor * criterion(*outputs_and_targets)


def add_to_loss(outputs: Any, term: Tensor) -> Any:
    """The outputs of a model with a term added to their `loss`."""
    return map_leaves(outputs, lambda name, value: value + term if name == "loss" else value)
