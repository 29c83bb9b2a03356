"""What the model sees of one micro-batch, and how its outputs fall apart again into new and replayed rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.tree import map_leaves
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.runtime.replay_account import Turn
from rehearsal_plugin.runtime.representatives import Share
from rehearsal_plugin.strategies import Part, Strategy
from rehearsal_plugin.strategies.base import Criterion, tensors_of

__all__ = ["MicroBatch", "no_criterion"]


@dataclass(frozen=True)
class MicroBatch:
    """New rows, then those of each draw.

    Attributes:
        columns: The batch's own rows in what the model sees, by field; empty where they are staged already.
        new: How many those are.
        share: The replayed rows; None for none.
        draws: Independent draws.
        keys: `[rows]` int64, the partition of each row that the model sees; None without partitions.
        labels: Those of all rows, where the batch has some by that name.
        turn: What it took, to be undone; None where nothing can be.
        displaced: Rows of the batch that made room.
        by_row: Whether the model's outputs have one entry a sample.
        tokens: `[rows]` int64, the tokens of each row that count; None where they are not counted.
        lengths: `[samples]` int64, the tokens of each sample of a flat row that the model sees, on the CPU; None where
            samples are rows, and where nobody asks.
    """

    columns: list[Tensor]
    new: int
    share: Share | None
    draws: int
    keys: IntArray | None = None
    labels: Tensor | None = None
    turn: Turn | None = None
    displaced: int = 0
    by_row: bool = True
    tokens: Tensor | None = None
    lengths: Tensor | None = None

    def parts(self, strategy: Strategy, outputs: Any, targets: tuple[Any, ...], criterion: Criterion) -> list[Part]:
        """The new rows, and those of each draw, with what belongs to them; without outputs for documents.

        Raises:
            BatchError: The outputs are not those of all rows.
        """
        if self.by_row:
            tensors = strategy.tensors(outputs)
            self._check("the model's output", tensors)
            self._check("target", tensors_of(targets))
        else:
            tensors, outputs, targets = tensors_of(outputs), {}, ()
        device = next(iter(tensors.values())).device  # batches of a loader may live elsewhere
        states: list[dict[str, Tensor]] = [{}] * (1 + self.draws)
        if self.share is not None:
            states[1:] = [
                {name: value.to(device) for name, value in self.share.layout.unpack_state(rows).items()}
                for rows in torch.split(self.share.rows, self.share.sizes)
            ]
        return [
            Part(output, target, state, size, criterion)
            for output, target, state, size in zip(
                self._split(outputs), self._split(targets), states, self.sizes, strict=True
            )
        ]

    def keys_by_part(self) -> list[IntArray | None]:
        """The keys of the new rows, and of those of each draw."""
        if self.keys is None:
            return [None] * len(self.sizes)
        return list(np.split(self.keys, np.cumsum(self.sizes)[:-1]))

    @property
    def sizes(self) -> list[int]:
        """New rows, and those of each draw."""
        return [self.new, *([0] * self.draws if self.share is None else self.share.sizes)]

    def _split(self, tree: Any) -> list[Any]:
        ends = list(accumulate(self.sizes))
        spans = zip([0, *ends], ends, strict=False)
        return [map_leaves(tree, partial(_cut, ends[-1], slice(*span))) for span in spans]

    def _check(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Tensors of other rows than those given would be split in the wrong places."""
        total = sum(self.sizes)
        for name, tensor in tensors.items():
            if len(tensor) != total:
                raise BatchError(
                    f"{what} '{name}' has {len(tensor)} rows and the micro-batch has {total}; "
                    "give outputs and targets for all rows that augment() returned"
                )


def no_criterion(*_: Any) -> Tensor:
    """Stands in where a model computed its loss itself."""
    raise ConfigError("this strategy computes the losses of new and replayed rows apart; call rehearsal.loss(...)")


def _cut(total: int, part: slice, _: str, leaf: Any) -> Any:
    """A part of a leaf that has the batch dimension; any other leaf as it is."""
    return leaf[part] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == total else leaf
