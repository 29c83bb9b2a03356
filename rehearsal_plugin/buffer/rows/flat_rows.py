"""Where documents lie in a flat row, and the leaves that tell it.

Three documents of 3, 1 and 2 tokens::

    position_ids   0 1 2 | 0 | 0 1        [1, 6]    begins anew with each document
    seq_idx        0 0 0 | 1 | 2 2        [1, 6]
    cu_seq_lens_q  0 3 4 6                [4]       the same for flash kernels, where the collator gives it
    max_length_q   3

A batch of several rows `[n, length]` without a mask, each of which counts its positions from 0, is n documents. Nothing
tells it from flat rows of one document each, but for the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.padding import IGNORED
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = [
    "DERIVED",
    "POSITIONS",
    "boundaries_of",
    "derived_leaves",
    "has_documents",
    "last_name",
    "leaves_but_derived",
    "lengths_of",
    "positions_of_rows",
    "rows_of",
    "stand_alone",
    "without_filling",
]

POSITIONS, SEQUENCE = "position_ids", "seq_idx"
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
DERIVED = (POSITIONS, SEQUENCE, *BOUNDARIES, *LONGEST)
"""Leaves that follow from the lengths of the documents, as Hugging Face calls them."""


def boundaries_of(batch: FlatBatch) -> list[str]:
    """Names of the leaves that tell kernels where documents begin, which other rows would make wrong."""
    return sorted(name for name in batch.names if last_name(name) in (*BOUNDARIES, *LONGEST))


def has_documents(batch: FlatBatch) -> bool:
    """Whether a batch is one flat row that says where its documents begin."""
    if boundaries_of(batch):
        return True
    positions = _leaf(batch, POSITIONS)
    # With a mask, models attend over the whole row, wherever positions begin anew.
    if not isinstance(positions, Tensor) or positions.ndim != 2 or _leaf(batch, "attention_mask") is not None:
        return False
    shapes = [leaf.shape[:2] for leaf in leaves_but_derived(batch).values() if isinstance(leaf, Tensor)]
    return positions.shape[0] == 1 and positions.shape in shapes  # else they are those of every row


def rows_of(batch: FlatBatch) -> int:
    """Rows of a batch of documents: 1 where it is a flat row."""
    positions = _leaf(batch, POSITIONS)
    return positions.shape[0] if isinstance(positions, Tensor) and not boundaries_of(batch) else 1


def stand_alone(batch: FlatBatch, lengths: Tensor) -> bool:
    """Whether every row of a batch is one document, so that it could be no flat row at all."""
    telling = [name for name in batch.names if last_name(name) in DERIVED and batch[name] is not None]
    return len(lengths) == rows_of(batch) and all(last_name(name) == POSITIONS for name in telling)


def positions_of_rows(batch: FlatBatch, count: int) -> dict[str, Tensor]:
    """The positions of `count` rows of one document each, by the name that the batch has for them."""
    name = _name(batch, POSITIONS)
    return {} if name is None else {name: batch[name][:1].expand(count, -1).clone()}


def lengths_of(batch: FlatBatch) -> Tensor:
    """Tokens of each document, one flat row behind the other, `[documents]` int64.

    Raises:
        BatchError: The leaves that tell them contradict each other, or tell none.
    """
    ends = [_ends(batch, name) for name in BOUNDARIES]
    told = [end for end in (*ends, _ends_by_position(batch)) if end is not None]
    if not told or not len(told[0]) or any(not torch.equal(end, told[0]) for end in told[1:]):
        raise BatchError(
            f"the batch is a flat row, and {[name for name in (*BOUNDARIES, POSITIONS) if _name(batch, name)]} do "
            "not tell alike where its documents begin; give position_ids that count from 0 in each document, or "
            "set rehearsal.packing to 'rows'"
        )
    return torch.diff(told[0], prepend=told[0].new_zeros(1))


def without_filling(batch: FlatBatch, lengths: Tensor) -> Tensor:
    """The `lengths` `[documents]` of a flat row without those that only fill it up to a length.

    They are the last ones, all of one and the same token and without a label, in one piece or each token on its own::

        input_ids   5 6 7 | 8 9 | 0 0        position_ids of the filling: 0 1, or 0 0
        labels      5 6 7 | 8 9 | -100 -100
    """
    tokens, labels = _leaf(batch, "input_ids"), _leaf(batch, "labels")
    if not isinstance(tokens, Tensor) or not isinstance(labels, Tensor) or tokens.shape != labels.shape:
        return lengths
    if tokens.ndim != 2 or rows_of(batch) > 1:
        return lengths
    told = ((labels != IGNORED) | (tokens != tokens[:, -1:])).reshape(-1).nonzero()
    if not len(told):
        return lengths
    starts = lengths.cumsum(0) - lengths
    return lengths[starts <= int(told[-1])]


def leaves_but_derived(batch: FlatBatch) -> dict[str, Any]:
    """The leaves that do not follow from the lengths of the documents, by name."""
    leaves = zip(batch.names, batch.leaves, strict=True)
    return {name: leaf for name, leaf in leaves if last_name(name) not in DERIVED}


def derived_leaves(batch: FlatBatch, lengths: Tensor) -> dict[str, Any]:
    """The leaves that tell where documents of `lengths` `[n]` lie, each as the batch has it."""
    ends = lengths.cumsum(0)
    starts = torch.repeat_interleave(ends - lengths, lengths)
    made: dict[str, Any] = {
        POSITIONS: (torch.arange(len(starts), device=starts.device) - starts).unsqueeze(0),
        SEQUENCE: torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths).unsqueeze(0),
        **dict.fromkeys(BOUNDARIES, torch.cat((ends.new_zeros(1), ends))),
        **dict.fromkeys(LONGEST, lengths.max() if len(lengths) else lengths.new_zeros(())),
    }
    leaves = {name: batch[name] for name in batch.names if last_name(name) in DERIVED}
    return {name: _like(made[last_name(name)], leaf) for name, leaf in leaves.items() if leaf is not None}


def _like(value: Tensor, leaf: Any) -> Any:
    """A value as the type, dtype and device of the leaf that it takes the place of."""
    return value.to(leaf.device, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)(int(value))


def _ends(batch: FlatBatch, name: str) -> Tensor | None:
    boundaries = _leaf(batch, name)
    return None if boundaries is None else torch.as_tensor(boundaries)[1:].long().cpu()


def _ends_by_position(batch: FlatBatch) -> Tensor | None:
    """The ends of the documents, by positions that count from 0 in each; an empty tensor where they do not."""
    positions: Tensor | None = _leaf(batch, POSITIONS)
    if positions is None:
        return None
    flat = positions.reshape(-1).long().cpu()
    starts = (flat == 0).nonzero().reshape(-1)
    if not len(starts) or starts[0] or len(starts) != positions.shape[0] > 1:
        return starts.new_empty(0)
    ends = torch.cat((starts[1:], starts.new_tensor([len(flat)])))
    counted = torch.arange(len(flat)) - torch.repeat_interleave(starts, ends - starts)
    return ends if torch.equal(counted, flat) else starts.new_empty(0)


def _leaf(batch: FlatBatch, name: str) -> Any:
    full = _name(batch, name)
    return None if full is None else batch[full]


def _name(batch: FlatBatch, name: str) -> str | None:
    return next((full for full in batch.names if last_name(full) == name), None)


def last_name(name: str) -> str:
    """The last key of the name of a leaf."""
    return name.rpartition(".")[2]
