"""A small model whose forward gets replayed rows, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.integrations.inject.forward import ForwardInjection

__all__ = ["ROWS", "WANTED", "Model", "Outputs", "attached", "backward", "itself", "rows"]

ROWS, WANTED = 8, 2


class Model(nn.Module):
    """Gives what `answer` makes of its values `[rows, 1]`, whose sum has the sum of the rows for a gradient."""

    def __init__(self, answer: Callable[[Tensor], Any] = lambda values: values) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        self.answer = answer
        self.seen: list[list[float]] = []

    def forward(self, x: Tensor, flag: bool = False) -> Any:
        self.seen.append(x.detach().flatten().tolist())
        return self.answer(self.linear(x))


@dataclass
class Outputs:
    logits: Tensor
    loss: Tensor | None = None


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def itself(values: Tensor) -> Tensor:
    return values


def rows(step: int, size: int = ROWS) -> Tensor:
    return (torch.arange(float(size)) + size * step + 1)[:, None]


def attached(rehearsal: Rehearsal, model: nn.Module) -> Any:
    ForwardInjection(rehearsal, model).register()
    return model
