"""What the scripts of the README train: a tiny language model on rows of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=128))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = [{"input_ids": row, "labels": row} for row in (torch.arange(128)[:, None] + torch.arange(16)) % 50]


def shard(rank: int, size: int) -> Iterable[Any]:
    """The batches of a rank: 8 rows each."""
    return DataLoader(data, batch_size=8, sampler=DistributedSampler(data, size, rank))  # type: ignore[arg-type]
