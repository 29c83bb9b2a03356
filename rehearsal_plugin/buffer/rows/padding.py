"""Rows of different length: stored at one length, replayed at that of the longest row of the batch.

A position is padding if it and all behind it hold the padding of every padded field. So a row may end with a token
that is also used as padding, as long as its label or its place in the mask says that it counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rehearsal_plugin.config import PaddingConfig
from rehearsal_plugin.core.tree import leaves_of, map_leaves
from rehearsal_plugin.errors import BatchError

__all__ = ["Padding"]


class Padding:
    """Pads and cuts the fields that have the length of the row, in dimension 1.

    Args:
        config: The section `rehearsal.padding`.
    """

    def __init__(self, config: PaddingConfig) -> None:
        self._length, self._values = config.length, config.values

    def widen(self, batch: Any) -> Any:
        """The batch at the length at which rows are stored.

        Raises:
            BatchError: A padded field is missing, has no length, has another than the others, or is too long.
        """
        self._width(batch)
        return self._to(batch, self._length)

    def narrow(self, batch: Any) -> Any:
        """The batch at the length of its longest row."""
        return self._to(batch, int(self.lengths(batch).max()) if self._rows(batch) else 0)

    def alike(self, batch: Any, replayed: Any) -> tuple[Any, Any]:
        """A batch and replayed rows of the stored length, both at the length that holds all of them.

        The batch keeps its own where that is longer.
        """
        width = max(self._width(batch), int(self.lengths(replayed).max()) if self._rows(replayed) else 0)
        return self._to(batch, width), self._to(replayed, width)

    def lengths(self, batch: Any) -> Tensor:
        """Positions of each row up to its last that is no padding, `[n]` int64."""
        count = torch.zeros((self._rows(batch), self._width(batch)), dtype=torch.bool)
        leaves = leaves_of(batch)
        for name, value in self._values.items():
            field = leaves[name]
            count = count.to(field.device)
            count |= (field != value).reshape(*field.shape[:2], -1).any(2)
        places = torch.arange(1, count.shape[1] + 1, device=count.device)
        return (count * places).amax(1) if count.numel() else count.new_zeros(len(count), dtype=torch.int64)

    def _rows(self, batch: Any) -> int:
        return len(leaves_of(batch)[next(iter(self._values))])

    def _width(self, batch: Any) -> int:
        """The common length of the padded fields, checked."""
        leaves, widths = leaves_of(batch), {}
        for name in self._values:
            field = leaves.get(name)
            if not isinstance(field, Tensor) or field.ndim < 2:
                what = f"shape {tuple(field.shape)}" if isinstance(field, Tensor) else type(field).__name__
                raise BatchError(
                    f"rehearsal.padding.values names '{name}', which has no length: the batch has {what} for it; name "
                    f"tensors [rows, length, ...] out of {sorted(leaves)}"
                )
            widths[name] = field.shape[1]
        if len(set(widths.values())) > 1:
            raise BatchError(f"the padded fields of a batch have one length, and not {widths}")
        width = next(iter(widths.values()))
        if width > self._length:
            raise BatchError(
                f"the rows of this batch have {width} positions, and rehearsal.padding.length is {self._length}; "
                "raise it, or cut the rows"
            )
        return width

    def _to(self, batch: Any, width: int) -> Any:
        def fitted(name: str, leaf: Any) -> Any:
            if name not in self._values or leaf.shape[1] == width:
                return leaf
            if leaf.shape[1] > width:
                return leaf[:, :width]
            behind = [0, 0] * (leaf.ndim - 2) + [0, width - leaf.shape[1]]
            return functional.pad(leaf, behind, value=_of_type(self._values[name], leaf))

        return map_leaves(batch, fitted)


def _of_type(value: float, tensor: Tensor) -> float:
    return value if tensor.is_floating_point() else int(value)
