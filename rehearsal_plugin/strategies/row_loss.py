"""Wrapper of a strategy whose rows carry their loss, for buffers with `score_by: loss`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.config.names import ROW_LOSS
from rehearsal_plugin.core.tree import map_leaves
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.strategies.base import Part, Strategy, tensors_of

__all__ = ["RowLoss", "row_losses"]

MODEL_LOSS = (
    "rehearsal.buffer.score_by is 'loss', and the model computes its loss itself, one for all rows; compute it "
    "with rehearsal.loss(criterion, outputs, *targets), or name a batch field"
)


class RowLoss(Strategy):
    """Behaves as another strategy, and records the task's loss of each single row.

    The loss of a new row comes from the forward in which it was new. Whenever the row is replayed, its present loss is
    stored on the rank that holds it.

    Args:
        inner: The other strategy.
    """

    records = True
    refreshes = True

    def __init__(self, inner: Strategy) -> None:
        super().__init__(inner.config)
        self._inner = inner
        self.draws, self.relearns = inner.draws, inner.relearns

    @property
    def plain(self) -> bool:
        """See `Strategy.plain`."""
        return self._inner.plain

    @property
    def replayed_weight(self) -> float | None:
        """See `Strategy.replayed_weight`."""
        return self._inner.replayed_weight

    def tensors(self, outputs: Any) -> dict[str, Tensor]:
        """See `Strategy.tensors`."""
        return self._inner.tensors(outputs)

    def state(self, new: Part) -> dict[str, Tensor]:
        """See `Strategy.state`: the state of the other strategy, and `ROW_LOSS` `[rows]` float32."""
        return {**self._inner.state(new), ROW_LOSS: row_losses(new)}

    def refresh(self, part: Part) -> dict[str, Tensor]:
        """See `Strategy.refresh`."""
        return {**self._inner.refresh(_without_loss(part)), ROW_LOSS: row_losses(part)}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Strategy.state_dict`."""
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Strategy.load_state_dict`."""
        self._inner.load_state_dict(state)

    def regularizer(self, replayed: Sequence[Part]) -> Tensor | None:
        """See `Strategy.regularizer`."""
        return self._inner.regularizer([_without_loss(part) for part in replayed])

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """See `Strategy.loss`."""
        return self._inner.loss(new, [_without_loss(part) for part in replayed])


@torch.no_grad()
def row_losses(part: Part) -> Tensor:
    """The task's loss of each single row, `[rows]` float32: as it is known, or the criterion mapped over the rows.

    Raises:
        BatchError: The criterion cannot be mapped.
        ConfigError: There is no criterion, as the model computes its loss itself.
    """
    if not part.size:
        return torch.empty(0, device="cpu")
    if part.losses is not None:
        return part.losses
    tree = {"outputs": part.outputs, "targets": tuple(part.targets)}
    columns = {name: tensor for name, tensor in tensors_of(tree).items() if len(tensor) == part.size}

    def loss_of_row(row: dict[str, Tensor]) -> Tensor:
        single = map_leaves(tree, lambda name, leaf: row[name].unsqueeze(0) if name in row else leaf)
        return part.criterion(single["outputs"], *single["targets"]).float()

    try:
        losses: Tensor = torch.func.vmap(loss_of_row)(columns)
    except ConfigError as error:
        raise ConfigError(MODEL_LOSS) from error
    except RuntimeError as error:
        raise BatchError(
            f"rehearsal.buffer.score_by is 'loss', and the criterion cannot be computed row by row with "
            f"torch.func.vmap: {error}; write it without masks as indices, .item() and the like, or name a batch field"
        ) from error
    return losses


def _without_loss(part: Part) -> Part:
    return replace(part, state={name: value for name, value in part.state.items() if name != ROW_LOSS})
