"""Attention masks `[rows, 1, length, length]` that follow from which document each position is part of.

LLaMA-Factory's `neat_packing` gives such masks, for rows of several documents. A row of two documents and one position
of padding, `o` where a position may look (0) and `x` where it may not (the lowest number of the dtype)::

    index  1 1 2 2 0      mask  o x x x x
                                o o x x x
                                x x o x x
                                x x o o x
                                x x x x x

The index is stored, `length` numbers in place of `length` squared. A mask is taken for such a one only if it is, to the
last bit, the mask that is made of its index.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.batch_form import BatchForm
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["BlockMask", "BlockMaskForm", "block_mask_of"]

LOG = logging.getLogger(__name__)

MASK = "attention_mask"


@dataclass(frozen=True)
class BlockMask:
    """How a mask is made of an index.

    Attributes:
        name: The leaf.
        dtype: Of the mask: True where a position may look, or numbers, 0 there.
        closed: The number where a position may not look.
        causal: Whether a position looks at those before it alone.
    """

    name: str
    dtype: torch.dtype
    closed: float
    causal: bool

    def index_of(self, mask: Tensor) -> Tensor | None:
        """The document of each position `[rows, length]` int32, from 1 on, 0 for padding; None where none tells it."""
        is_open = mask[:, 0] if self.dtype == torch.bool else mask[:, 0] == 0
        counts = is_open.diagonal(dim1=1, dim2=2)
        begins = counts.clone()
        begins[:, 1:] &= ~is_open.diagonal(offset=-1, dim1=1, dim2=2)
        index = (begins.cumsum(1) * counts).int()
        return index if torch.equal(self.mask_of(index), mask) else None

    def mask_of(self, index: Tensor) -> Tensor:
        """The mask `[rows, 1, length, length]` of an index `[rows, length]`."""
        alike = (index.unsqueeze(2) == index.unsqueeze(1)) & (index != 0).unsqueeze(1)
        if self.closed == -math.inf:  # a position that may look nowhere would be no number
            alike |= torch.diag_embed(index == 0)
        is_open = (alike.tril() if self.causal else alike).unsqueeze(1)
        if self.dtype == torch.bool:
            return is_open
        return torch.zeros((), dtype=self.dtype, device=index.device).where(is_open, self.closed)


class BlockMaskForm:
    """Samples of another form, of whose mask the index is stored; a `BatchForm`.

    Args:
        inner: Of batches with the index `[rows, length]` in place of the mask.
        block: How the mask is made of it.
    """

    def __init__(self, inner: BatchForm, block: BlockMask) -> None:
        self._inner, self._block = inner, block
        self._known: tuple[weakref.ref[FlatBatch], FlatBatch] | None = None  # the newest batch, and it with its index

    def infer(self, batch: FlatBatch, only: Collection[str] | None) -> tuple[RowLayout, FlatBatch]:
        """See `BatchForm.infer`."""
        return self._inner.infer(self._with_index(batch), only)

    def samples(self, batch: FlatBatch, layout: RowLayout) -> FlatBatch:
        """See `BatchForm.samples`."""
        return self._inner.samples(self._with_index(batch), layout)

    def fit(self, batch: FlatBatch, replayed: Mapping[str, Tensor]) -> tuple[FlatBatch, Mapping[str, Tensor]]:
        """See `BatchForm.fit`."""
        return self._inner.fit(self._with_index(batch), replayed)

    def join(self, layout: RowLayout, batch: FlatBatch, replayed: Mapping[str, Tensor], displaced: int) -> FlatBatch:
        """See `BatchForm.join`."""
        return self._with_mask(self._inner.join(layout, batch, replayed, displaced))

    def as_batch(self, layout: RowLayout, replayed: Mapping[str, Tensor]) -> FlatBatch:
        """See `BatchForm.as_batch`."""
        return self._with_mask(self._inner.as_batch(layout, replayed))

    def as_samples(self, batch: FlatBatch, names: Collection[str]) -> Mapping[str, Tensor]:
        """See `BatchForm.as_samples`."""
        return self._inner.as_samples(self._with_index(batch), names)

    def tokens(self, batch: FlatBatch, new: int) -> int:
        """See `BatchForm.tokens`."""
        return self._inner.tokens(self._with_index(batch), new)

    def replayed_tokens(self, replayed: Mapping[str, Tensor]) -> int:
        """See `BatchForm.replayed_tokens`."""
        return self._inner.replayed_tokens(replayed)

    def by_row(self, batch: FlatBatch) -> bool:
        """See `BatchForm.by_row`."""
        return self._inner.by_row(batch)

    def lengths(self, batch: FlatBatch) -> Tensor | None:
        """See `BatchForm.lengths`."""
        return self._inner.lengths(batch)

    def sums(self, batch: FlatBatch, values: Tensor) -> Tensor | None:
        """See `BatchForm.sums`."""
        return self._inner.sums(batch, values)

    def _with_index(self, batch: FlatBatch) -> FlatBatch:
        """The batch with the index in place of the mask, which is looked at once."""
        if self._known is not None and self._known[0]() is batch:
            return self._known[1]
        mask = batch.get(self._block.name)
        index = self._block.index_of(mask) if _is_mask(mask) and mask.dtype == self._block.dtype else None
        if index is None:
            raise BatchError(
                f"batch field '{self._block.name}' followed from the documents of each row in the first batch, and "
                "does not in this one, so the mask of replayed rows cannot be told; give masks of one kind, or set "
                "rehearsal.packing to 'rows'"
            )
        indexed = batch.with_leaves({self._block.name: index})
        self._known = weakref.ref(batch), indexed
        return indexed

    def _with_mask(self, batch: FlatBatch) -> FlatBatch:
        """A batch with an index, with the mask in its place."""
        return batch.with_leaves({self._block.name: self._block.mask_of(batch[self._block.name])})


def block_mask_of(batch: FlatBatch) -> BlockMask | None:
    """How the mask of a first batch is made of an index; None where there is none, or it is another one.

    A mask that is stored whole is warned of: it takes most of the memory of a row.
    """
    name = next((name for name in batch.names if name.rpartition(".")[2] == MASK), "")
    mask = batch.get(name)
    if not _is_mask(mask):
        return None
    closed = 0.0 if mask.dtype == torch.bool else float(mask.min()) or torch.finfo(mask.dtype).min
    for causal in (True, False):
        block = BlockMask(name, mask.dtype, closed, causal)
        if block.index_of(mask) is not None:
            return block
    LOG.warning(
        "batch field '%s' has the shape %s and does not follow from the documents of each row, so %.1f MiB of it are "
        "stored with every row; give a mask [rows, length] if the model takes one",
        name,
        tuple(mask.shape),
        mask[0].nbytes / 2**20,
    )
    return None


def _is_mask(mask: object) -> TypeGuard[Tensor]:
    """Whether a leaf is a mask of every row and pair of positions, in numbers that can be told from 0."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not mask.numel():
        return False
    square = mask.shape[1] == 1 and mask.shape[2] == mask.shape[3]
    return square and (mask.dtype == torch.bool or mask.is_floating_point())
