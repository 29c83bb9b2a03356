"""Batches without padding: one flat row of several documents, each of which is a sample.

In the buffer every document is a row of its own length. Replayed ones are appended to the flat row, and all leaves that
tell where documents lie are made anew (see `flat_rows`). What only fills the row up is no sample, and makes room for
them. A document that stands alone in its row, without boundaries for kernels, may as well be a row of a job that packs
nothing: replayed ones of its length become rows below it, which any model takes rightly.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.flat_rows import (
    DERIVED,
    derived_leaves,
    last_name,
    leaves_but_derived,
    lengths_of,
    positions_of_rows,
    rows_of,
    stand_alone,
    without_filling,
)
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.padding import IGNORED
from rehearsal_plugin.core.tree import FlatBatch
from rehearsal_plugin.errors import BatchError

__all__ = ["DocumentForm"]

NO_TOKEN = -1
"""What documents are padded with in the buffer, and labels with -100. No token is -1, so that lengths can be told."""


class DocumentForm:
    """Every document of a flat row is a sample; a `BatchForm`.

    Args:
        longest: Tokens of the longest document that can be stored.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._counted = ""  # the field by whose padding lengths are told
        self._known: list[tuple[weakref.ref[FlatBatch], Tensor, int]] = []  # of the newest batches

    def infer(self, batch: FlatBatch, only: Collection[str] | None) -> tuple[RowLayout, FlatBatch]:
        """See `BatchForm.infer`."""
        lengths, total = self._documents_in(batch)
        tokens, entries = _fields(batch, total, len(lengths))
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
        samples = self._split(batch, lengths, tokens, pads, self._longest)
        layout = RowLayout.infer(samples, {*tokens, *entries})
        passing = {**layout.passing, **{name: "made anew" for name in batch.names if last_name(name) in DERIVED}}
        return replace(layout, passing=passing, lengths={}, selected=True, pads=pads), samples

    def samples(self, batch: FlatBatch, layout: RowLayout) -> FlatBatch:
        """See `BatchForm.samples`."""
        lengths, total = self._documents_in(batch)
        tokens, entries = _fields(batch, total, len(lengths))
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
        lengths, total = self._documents_in(batch)
        kept, added = lengths[: len(lengths) - displaced], self._lengths_of(replayed)
        whole = total == int(lengths.sum())
        documents = torch.cat((kept, added.to(kept.device)))
        if whole and stand_alone(batch, lengths) and bool((documents == lengths[0]).all()):
            tokens = self._below(batch, replayed, layout.pads, len(kept), int(lengths[0]))
        elif rows_of(batch) > 1:
            raise BatchError(
                f"the batch has rows of {int(lengths[0])} tokens, and replayed documents have {documents.tolist()}; "
                "without padding they fit into one flat row alone: give flat rows, or set rehearsal.packing to 'rows'"
            )
        else:
            tokens = self._behind(batch, replayed, layout.pads, int(kept.sum()), added)
            tokens |= derived_leaves(batch, documents)
        others = [name for name in layout.names if name not in layout.pads]
        entries = {
            name: torch.cat((batch[name][: len(kept)], replayed[name].to(batch[name].device))) for name in others
        }
        return self._note(batch.with_leaves({**tokens, **entries}), documents, int(documents.sum()))

    def as_batch(self, layout: RowLayout, replayed: Mapping[str, Tensor]) -> FlatBatch:
        """See `BatchForm.as_batch`: documents `[r, length]`, padded with -1, labels with -100."""
        return layout.nesting.with_leaves(replayed)

    def as_samples(self, batch: FlatBatch, names: Collection[str]) -> Mapping[str, Tensor]:
        """See `BatchForm.as_samples`."""
        return {name: batch[name] for name in names}

    def tokens(self, batch: FlatBatch, new: int) -> int:
        """See `BatchForm.tokens`."""
        return int(self._lengths_in(batch)[:new].sum())

    def replayed_tokens(self, replayed: Mapping[str, Tensor]) -> int:
        """See `BatchForm.replayed_tokens`."""
        return int(self._lengths_of(replayed).sum()) if replayed else 0

    def by_row(self, batch: FlatBatch) -> bool:
        """See `BatchForm.by_row`."""
        return rows_of(batch) > 1

    def lengths(self, batch: FlatBatch) -> Tensor | None:
        """See `BatchForm.lengths`."""
        return None if self.by_row(batch) else self._lengths_in(batch)

    def sums(self, batch: FlatBatch, values: Tensor) -> Tensor | None:
        """See `BatchForm.sums`."""
        ends = self._lengths_in(batch).cumsum(0)
        upto = torch.cat((values.new_zeros(1, dtype=torch.int64), values.reshape(-1).cumsum(0)))[ends.to(values.device)]
        return torch.diff(upto, prepend=upto.new_zeros(1))

    def _lengths_in(self, batch: FlatBatch) -> Tensor:
        """Tokens of each document of a batch `[documents]`."""
        return self._documents_in(batch)[0]

    def _documents_in(self, batch: FlatBatch) -> tuple[Tensor, int]:
        """Tokens of each document of a batch `[documents]`, and of the batch with its filling; counted once."""
        for known, lengths, total in self._known:
            if known() is batch:
                return lengths, total
        every = lengths_of(batch)
        lengths, total = without_filling(batch, every), int(every.sum())
        self._note(batch, lengths, total)
        return lengths, total

    def _note(self, batch: FlatBatch, lengths: Tensor, total: int) -> FlatBatch:
        """Remember the lengths of a batch, and of the one before it, to which documents may be joined."""
        self._known = [(weakref.ref(batch), lengths, total), *self._known[:1]]
        return batch

    def _lengths_of(self, samples: Mapping[str, Tensor]) -> Tensor:
        """Tokens of each document `[n]` of samples `[n, length]`."""
        return (samples[self._counted] != NO_TOKEN).sum(1)

    def _behind(
        self, batch: FlatBatch, replayed: Mapping[str, Tensor], pads: Collection[str], stop: int, added: Tensor
    ) -> dict[str, Any]:
        """The first `stop` tokens of a flat row, `[1, tokens, ...]` a field, and documents of `added` tokens behind."""
        inside = torch.arange(replayed[self._counted].shape[1], device=added.device) < added.unsqueeze(1)
        return {
            name: torch.cat((batch[name][:, :stop], replayed[name][inside].to(batch[name].device).unsqueeze(0)), dim=1)
            for name in pads
        }

    @staticmethod
    def _below(
        batch: FlatBatch, replayed: Mapping[str, Tensor], pads: Collection[str], kept: int, width: int
    ) -> dict[str, Any]:
        """The first `kept` rows of a batch, `[rows, width, ...]` a field, with documents of that length below."""
        names = {name: replayed[name][:, :width].to(batch[name].device) for name in pads}
        rows = {name: torch.cat((batch[name][:kept], more)) for name, more in names.items()}
        return {**rows, **positions_of_rows(batch, kept + len(replayed[next(iter(pads))]))}

    def _split(
        self, batch: FlatBatch, lengths: Tensor, tokens: list[str], pads: Mapping[str, float], width: int = 0
    ) -> FlatBatch:
        """The documents as padded rows, as wide as the longest of them, or `width`."""
        longest = int(lengths.max()) if len(lengths) else 0
        if longest > self._longest:
            raise BatchError(
                f"a document of this batch has {longest} tokens, and {self._longest} is the most that is stored; raise "
                "rehearsal.padding.length"
            )
        width = max(width, longest)
        inside, stop = torch.arange(width, device=lengths.device) < lengths.unsqueeze(1), int(lengths.sum())
        rows: dict[str, Any] = {name: None for name in batch.names if last_name(name) in DERIVED}
        for name in tokens:
            leaf = batch[name]
            row = leaf.new_full((len(lengths), width, *leaf.shape[2:]), pads[name])
            row[inside.to(leaf.device)] = leaf.flatten(0, 1)[:stop]
            if name == self._counted and bool((leaf == NO_TOKEN).any()):
                raise BatchError(f"batch field '{name}' has tokens of -1, by which the end of a document is told")
            rows[name] = row
        return batch.with_leaves(rows)


def _fields(batch: FlatBatch, total: int, documents: int) -> tuple[list[str], list[str]]:
    """Names of the leaves with one entry for each of `total` tokens, `[rows, tokens, ...]`, and with one a document.

    Raises:
        BatchError: A leaf belongs to the flat row as a whole.
    """
    rows, tokens, entries = rows_of(batch), list[str](), list[str]()
    for name, leaf in leaves_but_derived(batch).items():
        if not isinstance(leaf, Tensor):
            _refuse_sequence(name, leaf, total, documents)
            continue
        if not leaf.ndim:
            continue
        if leaf.ndim > 1 and leaf.shape[:2] == (rows, total // rows):
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


def _refuse_sequence(name: str, leaf: Any, total: int, documents: int) -> None:
    """Refuse a list or array with one entry a token or document: it would stay as it is when documents are added."""
    shape = np.shape(leaf) if isinstance(leaf, np.ndarray) else (len(leaf),) if isinstance(leaf, (list, tuple)) else ()
    if shape and (shape[0] in (total, documents) or shape[:2] == (1, total)):
        raise BatchError(
            f"batch field '{name}' is a {type(leaf).__name__} beside a flat row of {total} tokens in {documents} "
            "documents, so it may have one entry a token or document; give it as a tensor, or leave it out of the batch"
        )


def _padding_of(name: str, leaf: Tensor) -> float:
    if last_name(name) == "labels":
        return IGNORED
    unsigned = leaf.dtype == torch.bool or leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.uint8
    return 0 if unsigned or last_name(name).endswith("mask") else NO_TOKEN
