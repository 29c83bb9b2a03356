"""Rows of different length: stored at one length, replayed at that of the longest row of the batch.

A position is padding if it and all behind it hold the padding of every padded field. So a row may end with a token
that is also used as padding, as long as its label or its place in the mask says that it counts. With 0 as padding of
both fields, these rows have the lengths 3, 2 and 0::

    tokens  5 7 0 0     mask  1 1 1 0     length 3   (the 0 counts: its mask is 1)
            5 7 0 0           1 1 0 0            2
            0 0 0 0           0 0 0 0            0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rehearsal_plugin.config import PaddingConfig
from rehearsal_plugin.core.tree import FlatBatch, flatten
from rehearsal_plugin.errors import BatchError

__all__ = ["Padding", "longest_for"]


USUAL: Mapping[str, float] = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": -100,
    "position_ids": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
    "completion_mask": 0,
    "assistant_masks": 0,
}
"""What tokenizers and collators of Hugging Face pad with, but for `input_ids` themselves."""


LEAST_LONGEST = 4096
"""Positions that rows can have at least where nothing says it."""


class Fields(Protocol):
    """Tensors by name: a flat batch, or the fields of replayed rows."""

    def __getitem__(self, name: str, /) -> Any: ...


class Padding:
    """Pads and cuts the fields that have the length of the row, in dimension 1.

    Args:
        config: The section `rehearsal.padding`.

    Attributes:
        length: Positions of the longest row that can be stored; None until the first batch where nothing says it.
        values: What each padded field is padded with, by name; empty until the first batch where nothing says it.
    """

    def __init__(self, config: PaddingConfig) -> None:
        self.length, self._token_id = config.length, config.token_id
        self.values: Mapping[str, float] = config.values or {}

    def widen(self, batch: Any) -> FlatBatch:
        """The batch at the length at which rows are stored.

        Raises:
            BatchError: A padded field is missing, has no length, has another than the others, or is too long.
        """
        flat = flatten(batch)
        self.values = self.values or self._usual_values(flat)
        width = self._check_width(flat)
        self.length = self.length or longest_for(width)
        return flat.with_leaves(self._fitted(flat, self.length))

    def narrow(self, batch: FlatBatch) -> FlatBatch:
        """The batch at the length of its longest row."""
        return batch.with_leaves(self._fitted(batch, self._longest(batch)))

    def alike(self, batch: FlatBatch, replayed: Mapping[str, Tensor]) -> tuple[FlatBatch, Mapping[str, Tensor]]:
        """A batch and the fields of replayed rows of the stored length, both at the length that holds all of them.

        The batch keeps its own where that is longer.
        """
        width = max(self._check_width(batch), self._longest(replayed))
        return batch.with_leaves(self._fitted(batch, width)), {**replayed, **self._fitted(replayed, width)}

    def lengths(self, fields: Fields) -> Tensor:
        """Positions of each row up to its last that is no padding, `[n]` int64."""
        first = fields[self._first]
        counts = torch.zeros(first.shape[:2], dtype=torch.bool, device=first.device)
        for name, value in self.values.items():
            field = fields[name]
            counts = counts.to(field.device)
            counts |= field != value if field.ndim == 2 else (field != value).flatten(2).any(2)
        places = torch.arange(1, counts.shape[1] + 1, device=counts.device)
        return (counts * places).amax(1) if counts.numel() else counts.new_zeros(len(counts), dtype=torch.int64)

    def _usual_values(self, batch: FlatBatch) -> Mapping[str, float]:
        """The padding of the fields that have a well-known name, and the length of `input_ids`.

        Raises:
            BatchError: There are no `input_ids` `[rows, length]`, or nothing tells their padding.
        """
        tokens = batch.get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            raise BatchError(
                "rehearsal.padding.values is left out, and the batch has no 'input_ids' [rows, length]; name the "
                f"fields that are padded, out of {sorted(batch.names)}"
            )
        if self._token_id is None and "attention_mask" not in batch.structure.places:
            raise BatchError(
                "the batch has no 'attention_mask', so the padding of 'input_ids' counts; give rehearsal.padding."
                "token_id, such as tokenizer.pad_token_id, or rehearsal.padding.values"
            )
        values = {**USUAL, "input_ids": self._token_id or 0}
        return {name: values[name] for name in values if _has_length(batch.get(name), tokens.shape)}

    @property
    def _first(self) -> str:
        return next(iter(self.values))

    def _longest(self, fields: Fields) -> int:
        return int(self.lengths(fields).max()) if len(fields[self._first]) else 0

    def _check_width(self, batch: FlatBatch) -> int:
        """The common length of the padded fields, checked."""
        widths = {name: self._width_of(batch, name) for name in self.values}
        if len(set(widths.values())) > 1:
            raise BatchError(f"the padded fields of a batch have one length, and not {widths}")
        width = next(iter(widths.values()))
        if self.length is not None and width > self.length:
            raise BatchError(
                f"the rows of this batch have {width} positions, and rehearsal.padding.length is {self.length}; "
                "raise it, or cut the rows"
            )
        return width

    def _width_of(self, batch: FlatBatch, name: str) -> int:
        field = batch.get(name)
        if not isinstance(field, Tensor) or field.ndim < 2:
            what = f"shape {tuple(field.shape)}" if isinstance(field, Tensor) else type(field).__name__
            raise BatchError(
                f"rehearsal.padding.values names '{name}', which has no length: the batch has {what} for it; name "
                f"tensors [rows, length, ...] out of {sorted(batch.names)}"
            )
        return field.shape[1]

    def _fitted(self, fields: Fields, width: int) -> dict[str, Tensor]:
        """The padded fields at another length, by name."""
        return {name: _at_width(fields[name], width, value) for name, value in self.values.items()}


def longest_for(width: int) -> int:
    """Positions that rows can have, where the first batch has `width` and nothing else is known."""
    return max(LEAST_LONGEST, 4 << (width - 1).bit_length())


def _has_length(leaf: Any, shape: Any) -> bool:
    """Whether a leaf has the rows and positions of `shape`."""
    return isinstance(leaf, Tensor) and leaf.shape[:2] == shape


def _at_width(field: Tensor, width: int, padding: float) -> Tensor:
    """A field `[n, length, ...]` cut or padded behind to `width` positions."""
    if field.shape[1] >= width:
        return field if field.shape[1] == width else field[:, :width]
    behind = [0, 0] * (field.ndim - 2) + [0, width - field.shape[1]]
    return functional.pad(field, behind, value=padding if field.is_floating_point() else int(padding))
