"""Rows of tokens of one domain, as a data set for the Trainer."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Rows"]


class Rows(Dataset[dict[str, Tensor]]):
    """`input_ids` and `labels`, int64 `[length]`, and the number of the domain.

    Args:
        rows: `[n, length]` integers.
        domain: Number of the domain.
    """

    def __init__(self, rows: NDArray[Any], domain: int) -> None:
        self._rows, self._domain = rows, torch.tensor(domain)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self._rows[index].astype("int64"))
        return {"input_ids": row, "labels": row, "domain": self._domain}
