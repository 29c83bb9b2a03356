"""What the model sees of one micro-batch, and how its outputs fall apart again into new and replayed rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.rows import RowLayout, map_leaves
from rehearsal_plugin.strategies import Part, Strategy
from rehearsal_plugin.strategies.base import Criterion

__all__ = ["MicroBatch", "no_criterion"]


@dataclass(frozen=True)
class MicroBatch:
    """New rows, then those of each draw.

    Attributes:
        columns: The batch's own rows in what the model sees, by field; empty where they are staged already.
        new: How many those are.
        rows: Replayed rows `[r, row_bytes]` uint8, draw by draw; None for none.
        replayed: How many each draw gave.
    """

    columns: list[Tensor]
    new: int
    rows: Tensor | None
    replayed: list[int]

    def own(self, strategy: Strategy, outputs: Any) -> Any:
        """The outputs for the new rows, without their history.

        Raises:
            BatchError: The outputs are not those of all rows.
        """
        self._check(strategy.tensors(outputs))
        return map_leaves(self._split(outputs)[0], lambda _, leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)

    def parts(
        self, strategy: Strategy, layout: RowLayout, outputs: Any, targets: tuple[Any, ...], criterion: Criterion
    ) -> list[Part]:
        """The new rows, and those of each draw, with what belongs to them.

        Raises:
            BatchError: The outputs are not those of all rows.
        """
        self._check(strategy.tensors(outputs))
        rows = [None] * len(self.replayed) if self.rows is None else torch.split(self.rows, self.replayed)
        states = [{}, *({} if part is None else layout.unpack_state(part) for part in rows)]
        sizes = [self.new, *self.replayed]
        return [
            Part(own, target, state, size, criterion)
            for own, target, state, size in zip(self._split(outputs), self._split(targets), states, sizes, strict=True)
        ]

    @property
    def _total(self) -> int:
        return self.new + sum(self.replayed)

    def _split(self, tree: Any) -> list[Any]:
        ends = list(accumulate([self.new, *self.replayed]))
        spans = zip([0, *ends], ends, strict=False)
        return [map_leaves(tree, partial(_cut, self._total, slice(*span))) for span in spans]

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        """Outputs of other rows than those given would be split in the wrong places."""
        for name, tensor in tensors.items():
            if len(tensor) != self._total:
                raise BatchError(
                    f"the model's output '{name}' has {len(tensor)} rows and the micro-batch has {self._total}; "
                    "give the outputs for all rows that augment() returned"
                )


def no_criterion(*_: Any) -> Tensor:
    """Stands in where a model computed its loss itself."""
    raise ConfigError("this strategy computes the losses of new and replayed rows apart; call rehearsal.loss(...)")


def _cut(total: int, part: slice, _: str, leaf: Any) -> Any:
    """A part of a leaf that has the batch dimension; any other leaf as it is."""
    return leaf[part] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == total else leaf
