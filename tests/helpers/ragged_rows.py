"""Padded rows of different length, as a batch of text has them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout

PADS = {"tokens": 0.0, "labels": -100.0}
LONGEST = 24


def padded_batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Texts of these lengths, numbered, with random tokens and labels that are partly masked."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), LONGEST)
    tokens, labels = torch.zeros(shape, dtype=torch.int32), torch.full(shape, -100)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.from_numpy(rng.integers(1, 1000, length, dtype=np.int32))
        labels[row, length // 2 : length] = tokens[row, length // 2 : length].long()
    return {"id": torch.arange(len(lengths), dtype=torch.int16), "tokens": tokens, "labels": labels}


LAYOUT = dataclasses.replace(RowLayout.infer(padded_batch([1])), pads=PADS)


def packed_rows(lengths: list[int], seed: int = 0) -> Tensor:
    """The same as packed rows `[n, row_bytes]`."""
    rows = torch.zeros((len(lengths), LAYOUT.row_bytes), dtype=torch.uint8)
    LAYOUT.pack(LAYOUT.columns(padded_batch(lengths, seed)), rows)
    return rows
