"""Rows of tokens, a tiny model of the next token, and a note of what it trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

__all__ = ["Note", "Rows", "TinyModel", "next_token_loss"]

LENGTH, VOCABULARY = 16, 64

Batch = dict[str, Tensor]


class Rows(Dataset[Batch]):
    """Rows that follow from their number."""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(self._first + index)
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


class TinyModel(nn.Module):
    """A recurrent network over tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layer = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.embedding(input_ids))[0])
        return logits


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss over tokens."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Note:
    """What a rank trained on, in the form of the witness of trainers."""

    def __init__(self) -> None:
        self._note: dict[str, Any] = {"train": [], "items": [], "evaluation": [], "loss": [], "logs": [{}]}

    def trained(self, batch: Batch, loss: Tensor) -> None:
        self._note["train"].append({name: value.clone() for name, value in batch.items()})
        self._note["items"].append(None)
        self._note["loss"].append(float(loss))

    def evaluated(self, batch: Batch, loss: Tensor) -> None:
        self._note["evaluation"].append({name: value.clone() for name, value in batch.items()})
        self._note["logs"][0].setdefault("eval_loss", float(loss))  # the first one is before training

    def write(self, model: nn.Module, rank: int) -> None:
        self._note["weights"] = {name: value.detach().clone() for name, value in model.named_parameters()}
        torch.save(self._note, Path(os.environ["CLIENT_WITNESS"]) / f"rank{rank}.pt")
