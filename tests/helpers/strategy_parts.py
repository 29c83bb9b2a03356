"""Strategies, and parts of random scores and labels, with losses in plain floats to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from rehearsal_plugin.config import StrategyConfig
from rehearsal_plugin.strategies import Part, Strategy, make_strategy
from rehearsal_plugin.strategies.base import flatten

ROWS, CLASSES = 6, 7


def strategy(name: str, **keys: Any) -> Strategy:
    return make_strategy(StrategyConfig(name=name, **keys))


def scores(seed: int, rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int, rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


def part(
    outputs: Any,
    *targets: Tensor,
    state: Mapping[str, Tensor] | None = None,
    criterion: Callable[..., Tensor] = cross_entropy,
) -> Part:
    return Part(outputs, targets, state or {}, len(next(iter(flatten(outputs).values()))), criterion)


def log_softmax(row: Sequence[float]) -> list[float]:
    """With plain floats: none of what is tested computes it."""
    values = torch.tensor(row, dtype=torch.float64)
    shifted = values - values.max()
    result: list[float] = (shifted - shifted.exp().sum().log()).tolist()
    return result


def entropies(outputs: Tensor, targets: Tensor) -> list[float]:
    """The cross-entropy of each row."""
    return [-log_softmax(row)[label] for row, label in zip(outputs.tolist(), targets.tolist(), strict=True)]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def near(first: Tensor | float, second: Tensor | float) -> bool:
    return bool(torch.isclose(torch.as_tensor(first).double(), torch.as_tensor(second).double(), rtol=1e-6, atol=1e-9))


def squares(first: Tensor, second: Tensor) -> float:
    pairs = list(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))
    return float(sum((a - b) ** 2 for a, b in pairs) / len(pairs))


def maps(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    return scores(seed, rows, 12).view(rows, 1, 3, 4), scores(seed + 50, rows, 20).view(rows, 2, 2, 5)


def both(outputs: tuple[Tensor, Tensor], *targets: Tensor) -> Tensor:
    return mse_loss(outputs[0], targets[0]) + mse_loss(outputs[1], targets[1])


def tokens(seed: int, classes: int = 11) -> Tensor:
    return 3 * torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(seed))
