"""A small model of tokens with hidden states, and their embeddings computed by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Model", "by_hand", "tokens"]


class Model(nn.Module):
    """Tokens to classes; `body` gives hidden states `[rows, tokens, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        output: Tensor = self.head(self.body(self.embed(input_ids)).mean(1))
        return output


def tokens(step: int, rank: int = 0, rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    ids = torch.randint(0, 50, (rows, 7), generator=generator)
    lengths = torch.randint(1, 8, (rows, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths).long(), "labels": ids[:, 0] % 5}


def by_hand(model: Model, batch: Any, pool: str) -> Tensor:
    """Embeddings as they are defined, row by row."""
    with torch.no_grad():
        hidden = model.body(model.embed(batch["input_ids"]))
    rows = []
    for row, mask in zip(hidden, batch["attention_mask"].bool(), strict=True):
        rows.append(row[mask].mean(0) if pool == "mean" else row[mask][-1])
    return torch.stack(rows)
