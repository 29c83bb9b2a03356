"""ER-ACE: the loss of new rows leaves the scores of absent classes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.strategies.base import Part, Strategy, register
from rehearsal_plugin.strategies.counted_loss import add_loss

__all__ = ["AsymmetricReplay"]


@register("er-ace")
class AsymmetricReplay(Strategy):
    """Cross-entropy in which the classes of new rows compete with those of the same batch only.

    Caccia et al., "New insights on reducing abrupt representation change in online continual learning", ICLR 2022.
    For classification: outputs are scores `[rows, classes]`, the first target is the class `[rows]` int64; the
    criterion is used for replayed rows. Before anything is replayed, new rows compete with all classes.
    """

    reads = frozenset({"loss_weight"})

    def regularizer(self, replayed: Sequence[Part]) -> Tensor | None:
        """See `Strategy.regularizer`: it needs scores and labels, not the model's loss."""
        raise ConfigError(
            "strategy 'er-ace' replaces the loss of new rows, and the model computes its loss itself; let it return "
            "scores and compute the loss with rehearsal.loss(criterion, outputs, labels)"
        )

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """See `Strategy.loss`."""
        if not replayed:
            return new.loss()
        scores, labels = new.outputs, new.targets[0] if new.targets else None
        if not isinstance(scores, Tensor) or scores.ndim != 2 or labels is None or labels.dtype != torch.int64:
            raise BatchError("strategy 'er-ace' needs scores [rows, classes] and int64 class labels [rows] as target")
        present = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        present[labels[labels >= 0]] = True  # negative labels are ignored by the loss
        among = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
        asymmetric = replace(new, outputs=among, targets=(labels,), criterion=functional.cross_entropy)
        total = add_loss(None, 1.0, asymmetric)
        for part in replayed:
            total = add_loss(total, self.config.loss_weight, part)
        return asymmetric.loss() if total is None else total
