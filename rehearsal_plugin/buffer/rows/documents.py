"""Batches without padding: one flat row of several documents, each of which is a sample.

Three documents of 3, 1 and 2 tokens, as TRL's `packing` and `padding_free` and `DataCollatorWithFlattening` give them::

    input_ids      5 7 9 | 4 | 8 2        [1, 6]
    position_ids   0 1 2 | 0 | 0 1        [1, 6]    begins anew with each document
    cu_seq_lens_q  0 3 4 6                [4]       the same for flash kernels, where the collator gives it
    max_length_q   3

In the buffer every document is a row of its own length. Replayed ones are appended to the flat row, and all leaves that
tell where documents lie are made anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["DocumentForm", "boundaries_of", "has_documents", "longest_document"]

POSITIONS, SEQUENCE = "position_ids", "seq_idx"
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
DERIVED = (POSITIONS, SEQUENCE, *BOUNDARIES, *LONGEST)
"""Leaves that follow from the lengths of the documents, as Hugging Face calls them."""

NO_LABEL, NO_TOKEN = -100, -1
"""What documents are padded with in the buffer. No token is -1, so that their lengths can be told."""


def boundaries_of(batch: FlatBatch) -> list[str]:
    """Names of the leaves that tell kernels where documents begin, which other rows would make wrong."""
    return sorted(name for name in batch.names if _last_name(name) in (*BOUNDARIES, *LONGEST))


def has_documents(batch: FlatBatch) -> bool:
    """Whether a batch is one flat row that says where its documents begin."""
    if boundaries_of(batch):
        return True
    positions = _leaf(batch, POSITIONS)
    # With a mask, models attend over the whole row, wherever positions begin anew.
    if not isinstance(positions, Tensor) or positions.ndim != 2 or _leaf(batch, "attention_mask") is not None:
        return False
    shapes = [leaf.shape[:2] for leaf in _leaves_but_derived(batch).values() if isinstance(leaf, Tensor)]
    return positions.shape[0] == 1 and positions.shape in shapes  # else they are those of every row


def longest_document(batch: FlatBatch) -> int:
    """Tokens of the longest document of a flat row."""
    return int(_lengths(batch).max())


class DocumentForm:
    """Every document of a flat row is a sample; a `BatchForm`.

    Args:
        longest: Tokens of the longest document that can be stored.
    """

    by_row = False

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._counted = ""  # the field by whose padding lengths are told

    def infer(self, batch: FlatBatch, only: Collection[str] | None) -> tuple[RowLayout, FlatBatch]:
        """See `BatchForm.infer`."""
        lengths = _lengths(batch)
        tokens, entries = _fields(batch, lengths)
        left_out = sorted({*tokens, *entries}.difference(only or (*tokens, *entries)))
        if left_out:
            raise BatchError(
                f"rehearsal.fields leaves out {left_out}, of which a flat row of documents has one entry a token or "
                "document; name them too, or leave rehearsal.fields out"
            )
        pads = {name: _padding_of(name, batch[name]) for name in tokens}
        counted = [name for name in tokens if pads[name] == NO_TOKEN]
        if not counted:
            raise BatchError(
                f"a flat row of documents needs token ids, integers of which none is -1, and the batch has {tokens}; "
                "give 'input_ids', or set rehearsal.packing to 'rows'"
            )
        self._counted = counted[0]
        samples = self._split(batch, lengths, tokens, pads)
        layout = RowLayout.infer(samples, {*tokens, *entries})
        passing = {**layout.passing, **{name: "made anew" for name in batch.names if _last_name(name) in DERIVED}}
        return replace(layout, passing=passing, lengths={}, selected=True, pads=pads), samples

    def samples(self, batch: FlatBatch, layout: RowLayout) -> FlatBatch:
        """See `BatchForm.samples`."""
        lengths = _lengths(batch)
        tokens, entries = _fields(batch, lengths)
        other = {*tokens, *entries}.symmetric_difference(layout.names)
        if other:
            raise BatchError(
                f"the batch has {sorted([*tokens, *entries])} for each token or document, and the first had "
                f"{sorted(layout.names)}; every batch needs the same fields"
            )
        return self._split(batch, lengths, tokens, layout.pads)

    def fit(self, batch: FlatBatch, replayed: Mapping[str, Tensor]) -> tuple[FlatBatch, Mapping[str, Tensor]]:
        """See `BatchForm.fit`."""
        return batch, replayed

    def join(self, layout: RowLayout, batch: FlatBatch, replayed: Mapping[str, Tensor], displaced: int) -> FlatBatch:
        """See `BatchForm.join`."""
        lengths = _lengths(batch)
        kept = lengths[: len(lengths) - displaced]
        stop, added = int(kept.sum()), self._lengths_of(replayed)
        inside = torch.arange(replayed[self._counted].shape[1], device=added.device) < added.unsqueeze(1)
        joined: dict[str, Any] = {}
        for name in layout.names:
            leaf = batch[name]
            if name in layout.pads:
                more = replayed[name][inside].to(leaf.device).unsqueeze(0)
                joined[name] = torch.cat((leaf[:, :stop], more), dim=1)
            else:
                joined[name] = torch.cat((leaf[: len(kept)], replayed[name].to(leaf.device)))
        return batch.with_leaves({**joined, **_derived(batch, torch.cat((kept, added.to(kept.device))))})

    def as_batch(self, layout: RowLayout, replayed: Mapping[str, Tensor]) -> FlatBatch:
        """See `BatchForm.as_batch`: documents `[r, longest]`, padded with -1, labels with -100."""
        return layout.nesting.with_leaves(replayed)

    def as_samples(self, batch: FlatBatch, names: Collection[str]) -> Mapping[str, Tensor]:
        """See `BatchForm.as_samples`."""
        return {name: batch[name] for name in names}

    def tokens(self, batch: FlatBatch, new: int) -> int:
        """See `BatchForm.tokens`."""
        return int(_lengths(batch)[:new].sum())

    def replayed_tokens(self, replayed: Mapping[str, Tensor]) -> int:
        """See `BatchForm.replayed_tokens`."""
        return int(self._lengths_of(replayed).sum()) if replayed else 0

    def lengths(self, batch: FlatBatch) -> Tensor:
        """See `BatchForm.lengths`."""
        return _lengths(batch)

    def sums(self, batch: FlatBatch, values: Tensor) -> Tensor:
        """See `BatchForm.sums`."""
        ends = _lengths(batch).cumsum(0)
        upto = torch.cat((values.new_zeros(1, dtype=torch.int64), values.reshape(-1).cumsum(0)))[ends.to(values.device)]
        return torch.diff(upto, prepend=upto.new_zeros(1))

    def _lengths_of(self, samples: Mapping[str, Tensor]) -> Tensor:
        """Tokens of each document `[n]` of samples `[n, longest]`."""
        return (samples[self._counted] != NO_TOKEN).sum(1)

    def _split(self, batch: FlatBatch, lengths: Tensor, tokens: list[str], pads: Mapping[str, float]) -> FlatBatch:
        """The documents as padded rows."""
        longest = int(lengths.max()) if len(lengths) else 0
        if longest > self._longest:
            raise BatchError(
                f"a document of this batch has {longest} tokens, and {self._longest} is the most that is stored; raise "
                "rehearsal.padding.length"
            )
        inside = torch.arange(self._longest, device=lengths.device) < lengths.unsqueeze(1)
        rows: dict[str, Any] = {name: None for name in batch.names if _last_name(name) in DERIVED}
        for name in tokens:
            leaf = batch[name]
            row = leaf.new_full((len(lengths), self._longest, *leaf.shape[2:]), pads[name])
            row[inside.to(leaf.device)] = leaf[0]
            if name == self._counted and bool((leaf == NO_TOKEN).any()):
                raise BatchError(f"batch field '{name}' has tokens of -1, by which the end of a document is told")
            rows[name] = row
        return batch.with_leaves(rows)


def _lengths(batch: FlatBatch) -> Tensor:
    """Tokens of each document of a flat row, `[documents]` int64.

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


def _fields(batch: FlatBatch, lengths: Tensor) -> tuple[list[str], list[str]]:
    """Names of the leaves with one entry a token, `[1, tokens, ...]`, and of those with one a document.

    Raises:
        BatchError: A leaf belongs to the flat row as a whole.
    """
    total, documents = int(lengths.sum()), len(lengths)
    tokens, entries = [], []
    for name, leaf in _leaves_but_derived(batch).items():
        if not isinstance(leaf, Tensor):
            _refuse_sequence(name, leaf, total, documents)
            continue
        if not leaf.ndim:
            continue
        if leaf.ndim > 1 and leaf.shape[:2] == (1, total):
            tokens.append(name)
        elif leaf.shape[0] == documents:
            entries.append(name)
        else:
            raise BatchError(
                f"batch field '{name}' has the shape {tuple(leaf.shape)} beside a flat row of {total} tokens in "
                f"{documents} documents, and belongs to neither; give one entry a token or document, or set "
                "rehearsal.packing to 'rows'"
            )
    return tokens, entries


def _leaves_but_derived(batch: FlatBatch) -> dict[str, Any]:
    """The leaves that do not follow from the lengths of the documents, by name."""
    leaves = zip(batch.names, batch.leaves, strict=True)
    return {name: leaf for name, leaf in leaves if _last_name(name) not in DERIVED}


def _refuse_sequence(name: str, leaf: Any, total: int, documents: int) -> None:
    """Refuse a list or array with one entry a token or document: it would stay as it is when documents are added."""
    shape = np.shape(leaf) if isinstance(leaf, np.ndarray) else (len(leaf),) if isinstance(leaf, (list, tuple)) else ()
    if shape and (shape[0] in (total, documents) or shape[:2] == (1, total)):
        raise BatchError(
            f"batch field '{name}' is a {type(leaf).__name__} beside a flat row of {total} tokens in {documents} "
            "documents, so it may have one entry a token or document; give it as a tensor, or leave it out of the batch"
        )


def _derived(batch: FlatBatch, lengths: Tensor) -> dict[str, Any]:
    """The leaves that tell where documents of `lengths` `[n]` lie, each as the batch has it."""
    ends = lengths.cumsum(0)
    starts = torch.repeat_interleave(ends - lengths, lengths)
    made: dict[str, Any] = {
        POSITIONS: (torch.arange(len(starts), device=starts.device) - starts).unsqueeze(0),
        SEQUENCE: torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths).unsqueeze(0),
        **dict.fromkeys(BOUNDARIES, torch.cat((ends.new_zeros(1), ends))),
        **dict.fromkeys(LONGEST, lengths.max() if len(lengths) else lengths.new_zeros(())),
    }
    leaves = {name: batch[name] for name in batch.names if _last_name(name) in DERIVED}
    return {name: _like(made[_last_name(name)], leaf) for name, leaf in leaves.items() if leaf is not None}


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
    if positions.shape[0] != 1 or not len(starts) or starts[0]:
        return starts.new_empty(0)
    ends = torch.cat((starts[1:], starts.new_tensor([len(flat)])))
    counted = torch.arange(len(flat)) - torch.repeat_interleave(starts, ends - starts)
    return ends if torch.equal(counted, flat) else starts.new_empty(0)


def _padding_of(name: str, leaf: Tensor) -> float:
    if _last_name(name) == "labels":
        return NO_LABEL
    unsigned = leaf.dtype == torch.bool or leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.uint8
    return 0 if unsigned or _last_name(name).endswith("mask") else NO_TOKEN


def _leaf(batch: FlatBatch, name: str) -> Any:
    full = _name(batch, name)
    return None if full is None else batch[full]


def _name(batch: FlatBatch, name: str) -> str | None:
    return next((full for full in batch.names if _last_name(full) == name), None)


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]
