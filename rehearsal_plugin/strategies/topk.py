"""Distillation for large vocabularies: the k largest logits of each token are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.strategies.base import Part, Strategy, register
from rehearsal_plugin.strategies.counted_loss import mean_over_rows

__all__ = ["TopKDistillation", "distillation_loss"]


@register("topk")
class TopKDistillation(Strategy):
    """The task's loss on all rows, plus alpha times a distillation loss on replayed ones.

    A row carries, for every position, the log-probabilities and the ids of its k most likely classes: 8 k bytes a
    token, instead of 4 bytes for every class. All other classes count as one (Hinton et al., "Distilling the knowledge
    in a neural network", 2015).
    """

    reads = frozenset({"alpha", "k", "outputs"})
    records = True

    def state(self, new: Part) -> dict[str, Tensor]:
        """See `Strategy.state`: `values` `[..., k]` float32 log-probabilities and `ids` `[..., k]` int32."""
        values, ids = self._checked_logits(new.outputs).float().log_softmax(-1).topk(self.config.k)
        return {"values": values, "ids": ids.int()}

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """See `Strategy.loss`."""
        task, distillation = mean_over_rows((part, 1.0) for part in (new, *replayed)), self.regularizer(replayed)
        return task if distillation is None else task + distillation

    def regularizer(self, replayed: Sequence[Part]) -> Tensor | None:
        """See `Strategy.regularizer`: the distillation loss."""
        if not replayed:
            return None
        (part,) = replayed
        return self.config.alpha * distillation_loss(
            self._checked_logits(part.outputs), part.state["values"], part.state["ids"]
        )

    def _checked_logits(self, outputs: Any) -> Tensor:
        tensors = self.tensors(outputs)
        logits = tensors.get("logits", next(iter(tensors.values())))
        if logits.ndim < 2 or logits.shape[-1] < self.config.k:
            raise BatchError(
                f"strategy 'topk' needs logits [rows, ..., classes] with at least {self.config.k} classes "
                f"(rehearsal.strategy.k), not {tuple(logits.shape)}; lower it, or name the logits "
                "in rehearsal.strategy.outputs"
            )
        return logits


def distillation_loss(logits: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy between recorded and present probabilities, averaged over positions.

    With 4 classes and k = 2, recorded (.6, .3, .1, 0) and present (.5, .2, .2, .1) are compared as three classes:

        recorded   .6 .3  rest .1
        present    .5 .2  rest .3       loss = -(.6 log .5 + .3 log .2 + .1 log .3)

    Args:
        logits: `[..., classes]`, present.
        values: `[..., k]`, the recorded log-probabilities of the k most likely classes.
        ids: `[..., k]`, the ids of these classes.

    Returns:
        A scalar; with k = classes it is the cross-entropy over all classes.
    """
    logp = logits.float().log_softmax(-1).gather(-1, ids.long())
    loss = -(values.exp() * logp).sum(-1)
    if ids.shape[-1] < logits.shape[-1]:
        loss = loss - _rest_log_probability(values).exp() * _rest_log_probability(logp)
    return loss.mean()


def _rest_log_probability(logp: Tensor) -> Tensor:
    """Log-probability of all classes beyond the k, `[...]`: log(1 - sum of their probabilities)."""
    smallest = torch.finfo(logp.dtype).eps  # the k probabilities may round to 1 together, and log(0) is not finite
    return torch.log1p(-logp.exp().sum(-1).clamp(max=1 - smallest))
