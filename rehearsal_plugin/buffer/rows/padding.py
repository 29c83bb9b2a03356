"""Rows of different length: stored at one length, replayed as long as the longest row of the batch.

A position is padding if it and all behind it hold the padding of every padded field. So a row may end with a token
that is also used as padding, as long as its label or its place in the mask says that it counts. With 0 as padding of
both fields, these rows have the lengths 3, 2 and 0::

    tokens  5 7 0 0     mask  1 1 1 0     length 3   (the 0 counts: its mask is 1)
            5 7 0 0           1 1 0 0            2
            0 0 0 0           0 0 0 0            0

Fields may have widths of their own, such as the chosen and the rejected answer of a preference pair, or the inputs and
the labels of an encoder-decoder model. All are stored at one length. In a batch, fields of one width keep one width,
so tokens and their mask never part::

    batch     chosen [4, 9]   chosen_mask [4, 9]   rejected [4, 6]      replayed row: 11 chosen, 5 rejected
    joined    chosen [5, 11]  chosen_mask [5, 11]  rejected [5, 6]
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rehearsal_plugin.config import PaddingConfig
from rehearsal_plugin.core.tree import FlatBatch, flatten
from rehearsal_plugin.errors import BatchError

__all__ = ["IGNORED", "Padding", "longest_for"]

IGNORED = -100
"""The label of a token that the loss leaves out, as in torch and in models of Hugging Face."""

USUAL: Mapping[str, float] = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": IGNORED,
    "position_ids": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
    "completion_mask": 0,
    "assistant_masks": 0,
    "loss_scale": 0,
}
"""What tokenizers, and collators of Hugging Face and ms-swift, pad with, but for `input_ids` themselves."""

PREFIXES = ("", "decoder_", "chosen_", "rejected_", "KL_")
"""Before the names of other sequences of a row: of an encoder-decoder model, and of TRL's preference trainers."""


MASK = re.compile(r"(?<!global_)attention_mask$")
"""Fields that tell padding from tokens; that of global attention tells tokens apart."""

LEAST_LONGEST = 1 << 15
"""Positions that rows can have at least where nothing says it: the same on ranks whose first batches differ."""


class Fields(Protocol):
    """Tensors by name: a flat batch, or the fields of replayed rows."""

    def __getitem__(self, name: str, /) -> Any: ...


class Padding:
    """Pads and cuts the fields that have a length, in dimension 1.

    Args:
        config: The section `rehearsal.padding`.

    Attributes:
        length: Positions of the longest row that can be stored; None until the first batch where nothing says it.
        values: What each padded field is padded with, by name; empty until the first batch where nothing says it.
    """

    def __init__(self, config: PaddingConfig) -> None:
        self.length, self._token_id = config.length, config.token_id
        self.values: Mapping[str, float] = config.values or {}

    def widen(self, batch: Any, only: Collection[str] | None = None) -> FlatBatch:
        """The batch at the length at which rows are stored.

        Args:
            batch: Rows of different length.
            only: Names of the fields of a row, where not all are stored; asked for the first batch.

        Raises:
            BatchError: A padded field is missing, has no length, is too long, or is padded before its rows.
        """
        flat = flatten(batch)
        self.values = self.values or self._usual_values(flat, flat.names if only is None else only)
        longest = max(self._names_by_width(flat))
        self._refuse_padding_before(flat)
        self.length = self.length or longest_for(longest)
        return flat.with_leaves(self._fitted(flat, self.values, self.length))

    def limit(self, batch: FlatBatch) -> FlatBatch:
        """The batch no wider than rows are stored; most are as they are.

        Raises:
            BatchError: As for `widen`.
        """
        width = max(self._names_by_width(batch))
        self._refuse_padding_before(batch)
        if self.length is None or width <= self.length:
            return batch
        return batch.with_leaves({name: batch[name][:, : self.length] for name in self.values})

    def narrow(self, batch: FlatBatch) -> FlatBatch:
        """A batch of the stored length at that of its longest row, in all fields."""
        return batch.with_leaves(self._fitted(batch, self.values, self._longest(batch, self.values)))

    def alike(self, batch: FlatBatch, replayed: Mapping[str, Tensor]) -> tuple[FlatBatch, Mapping[str, Tensor]]:
        """A batch and the fields of replayed rows of the stored length, both at lengths that hold all of them.

        Fields of one width in the batch have one in both; it is that of the batch where that is longer.
        """
        leaves, columns = dict[str, Tensor](), dict(replayed)
        for width, names in self._names_by_width(batch).items():
            common = max(width, self._longest(replayed, names))
            leaves |= self._fitted(batch, names, common)
            columns |= self._fitted(replayed, names, common)
        return batch.with_leaves(leaves), columns

    def lengths(self, fields: Fields) -> Tensor:
        """Positions of each row up to its last that is no padding in any field, `[n]` int64."""
        return self._lengths(fields, self.values)

    def _lengths(self, fields: Fields, names: Iterable[str]) -> Tensor:
        counted: dict[int, Tensor] = {}  # by width, `[n, width]`
        for name in names:
            field, value = fields[name], self.values[name]
            counts = field != value if field.ndim == 2 else (field != value).flatten(2).any(2)
            before = counted.get(field.shape[1])
            counted[field.shape[1]] = counts if before is None else before.to(counts.device) | counts
        first, *others = (_last_counted(counts) for counts in counted.values())
        for lengths in others:
            first = torch.maximum(first.to(lengths.device), lengths)
        return first

    def _usual_values(self, batch: FlatBatch, stored: Collection[str]) -> Mapping[str, float]:
        """The padding of the fields that have a well-known name, and the length of their tokens, among those stored.

        Raises:
            BatchError: There are no `input_ids` `[rows, length]`, or nothing tells their padding.
        """
        tokens = {prefix: batch.get(f"{prefix}input_ids") for prefix in PREFIXES if f"{prefix}input_ids" in stored}
        shapes = {prefix: ids.shape for prefix, ids in tokens.items() if isinstance(ids, Tensor) and ids.ndim == 2}
        if not shapes:
            raise BatchError(
                "rehearsal.padding.values is left out, and the batch has no 'input_ids' [rows, length]; name the "
                f"fields that are padded, out of {sorted(batch.names)}"
            )
        masks = batch.structure.places.keys() & stored
        unmasked = [prefix for prefix in shapes if f"{prefix}attention_mask" not in masks]
        if self._token_id is None and unmasked:
            prefix = unmasked[0]
            raise BatchError(
                f"the batch has no '{prefix}attention_mask', so the padding of '{prefix}input_ids' counts; give "
                "rehearsal.padding.token_id, such as tokenizer.pad_token_id, or rehearsal.padding.values"
            )
        values = {**USUAL, "input_ids": self._token_id or 0}
        return {
            f"{prefix}{name}": value
            for prefix, shape in shapes.items()
            for name, value in values.items()
            if f"{prefix}{name}" in stored and _is_sequence(name, batch.get(f"{prefix}{name}"), shape)
        }

    def _longest(self, fields: Fields, names: Iterable[str]) -> int:
        lengths = self._lengths(fields, names)
        return int(lengths.max()) if len(lengths) else 0

    def _names_by_width(self, batch: FlatBatch) -> Mapping[int, list[str]]:
        """The padded fields that have each width, checked."""
        names: dict[int, list[str]] = {}
        for name in self.values:
            names.setdefault(self._width_of(batch, name), []).append(name)
        if self.length is not None and max(names) > self.length:
            self._refuse_too_long(batch)
        return names

    def _refuse_too_long(self, batch: FlatBatch) -> None:
        """Raise `BatchError` if a row is longer than what is stored; the batch may be wider, by padding alone."""
        longest = self._longest(batch, self.values)
        if longest > (self.length or longest):
            raise BatchError(
                f"the rows of this batch have {longest} positions, and rehearsal.padding.length is {self.length}; "
                "raise it, or cut the rows"
            )

    def _refuse_padding_before(self, batch: FlatBatch) -> None:
        """Raise `BatchError` if rows of a mask begin with padding: then their last token would not be at the end."""
        for name, value in self.values.items():
            if MASK.search(name) and _begins_with_padding(batch[name], value):
                raise BatchError(
                    f"rows of '{name}' begin with padding, and rehearsal.padding adds more behind, so their last token "
                    "would not be at the end any more; set the tokenizer's padding_side to 'right', or give all "
                    "batches one width and leave rehearsal.padding out"
                )

    def _width_of(self, batch: FlatBatch, name: str) -> int:
        field = batch.get(name)
        if not isinstance(field, Tensor) or field.ndim < 2:
            what = f"shape {tuple(field.shape)}" if isinstance(field, Tensor) else type(field).__name__
            raise BatchError(
                f"rehearsal.padding.values names '{name}', which has no length: the batch has {what} for it; name "
                f"tensors [rows, length, ...] out of {sorted(batch.names)}"
            )
        return field.shape[1]

    def _fitted(self, fields: Fields, names: Iterable[str], width: int) -> dict[str, Tensor]:
        """The fields `names` at another length, by name."""
        return {name: _at_width(fields[name], width, self.values[name]) for name in names}


def _begins_with_padding(mask: Tensor, value: float) -> bool:
    """Whether rows of a mask `[n, length]` hold padding first and not last."""
    return mask.ndim == 2 and bool(((mask[:, :1] == value) & (mask[:, -1:] != value)).any())


def longest_for(width: int) -> int:
    """Positions that rows can have, where the first batch has `width` and nothing else is known."""
    return LEAST_LONGEST if width <= LEAST_LONGEST else 4 << (width - 1).bit_length()


def _last_counted(counts: Tensor) -> Tensor:
    """One more than the last true place of each row of `counts` `[n, width]`, `[n]` int64."""
    places = torch.arange(1, counts.shape[1] + 1, device=counts.device)
    return (counts * places).amax(1) if counts.numel() else counts.new_zeros(len(counts), dtype=torch.int64)


def _is_sequence(name: str, leaf: Any, shape: Any) -> bool:
    """Whether a leaf has the rows and positions of `shape`, or is the labels of another sequence."""
    if not isinstance(leaf, Tensor) or leaf.shape[:1] != shape[:1]:
        return False
    return leaf.shape[:2] == shape or (name == "labels" and leaf.ndim == 2 and leaf.dtype in (torch.int32, torch.int64))


def _at_width(field: Tensor, width: int, padding: float) -> Tensor:
    """A field `[n, length, ...]` cut or padded behind to `width` positions."""
    if field.shape[1] >= width:
        return field if field.shape[1] == width else field[:, :width]
    behind = [0, 0] * (field.ndim - 2) + [0, width - field.shape[1]]
    return functional.pad(field, behind, value=padding if field.is_floating_point() else int(padding))
