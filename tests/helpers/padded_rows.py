"""Texts of different length, padded as collators do."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EOS", "IGNORED", "LONGEST", "VALUES", "Batch", "collate", "new_batch", "number_of", "numbers", "row"]

EOS, IGNORED, LONGEST = 7, -100, 24
VALUES = {"input_ids": EOS, "attention_mask": 0, "labels": IGNORED}
Batch = dict[str, Tensor]


def row(number: int) -> Batch:
    """A text that ends with EOS, of a length of its own; its prompt has no labels."""
    length = 3 + (number * 7) % 18
    ids = torch.arange(length) + 10 + number * 100
    ids[-1] = EOS
    labels = ids.clone()
    labels[: length // 3] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones(length, dtype=torch.int64), "labels": labels}


def collate(rows: list[Batch]) -> Batch:
    """As collators do: padded behind, to the longest row."""
    return {
        name: torch.nn.utils.rnn.pad_sequence([one[name] for one in rows], batch_first=True, padding_value=value)
        for name, value in VALUES.items()
    }


def new_batch(step: int, size: int = 6, rank: int = 0) -> Batch:
    return collate([row(number) for number in numbers(step, size, rank)])


def numbers(step: int, size: int = 6, rank: int = 0) -> range:
    first = 1000 * rank + step * size
    return range(first, first + size)


def number_of(ids: Tensor) -> int:
    return int((ids[0] - 10) // 100)
