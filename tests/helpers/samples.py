"""Samples with ids: all fields of a sample follow from its id, and so do the rank and the step that it was new on."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Batch", "ids_of", "intact", "language", "new_batch", "rank_of", "same", "samples", "step_of"]

Batch: TypeAlias = dict[str, Tensor]

PER_STEP, PER_RANK = 100, 1_000_000


def samples(ids: Tensor, label: Tensor | None = None) -> Batch:
    """A batch with fields of several dtypes; `label` is free, the others follow from `ids` `[b]` int64."""
    return {
        "x": (ids[:, None] * torch.tensor([1, 2, 3])).to(torch.float64),
        "half": (ids % 251).to(torch.bfloat16),
        "odd": ids % 2 == 1,
        "id": ids,
        "label": ids % 5 if label is None else label,
    }


def new_batch(rank: int, step: int, size: int, label: int | None = None) -> Batch:
    """The batch that `rank` sees at `step`, counted from 0."""
    ids = torch.arange(size) + PER_STEP * step + PER_RANK * rank
    return samples(ids, None if label is None else torch.full((size,), label))


def same(first: Batch, second: Batch) -> bool:
    """Bit-identical, field by field."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def intact(batch: Batch) -> bool:
    """Whether all fields of every sample belong together."""
    return same(batch, samples(batch["id"]))


def ids_of(batch: Batch, start: int) -> list[int]:
    ids: list[int] = batch["id"][start:].tolist()
    return ids


def rank_of(sample: int) -> int:
    return sample // PER_RANK


def step_of(sample: int) -> int:
    return sample % PER_RANK // PER_STEP


def language(seed: int, rows: int = 6, length: int = 7, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    """Logits `[rows, length, vocabulary]` and labels; one row is labelled in part, another nowhere."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (rows, length), generator=generator)
    labels[0, 3:] = -100
    labels[2, :] = -100
    return torch.randn(rows, length, vocabulary, generator=generator), labels
