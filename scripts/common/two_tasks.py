"""Four classes in two tasks, for the examples: a model that learns the second task forgets the first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["STEPS", "TASKS", "batch_of", "make_model", "percent_right", "rows_of"]

TASKS, CLASSES, WIDTH = 2, 2, 8
STEPS = 100
"""Steps of a task."""


def rows_of(task: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points `[count, 8]` around the centre of their class, and their classes `[count]`."""
    chance = torch.Generator().manual_seed(seed)
    labels = CLASSES * task + torch.randint(CLASSES, (count,), generator=chance)
    return 2 + 3 * torch.eye(WIDTH)[labels] + torch.randn(count, WIDTH, generator=chance) / 4, labels


def batch_of(task: int, step: int, rank: int = 0) -> dict[str, Tensor]:
    """A batch of 16 rows, another one for each step and rank."""
    points, labels = rows_of(task, 16, seed=1 + step + 10_000 * rank)
    return {"points": points, "labels": labels}


def make_model() -> nn.Module:
    """Scores `[rows, 4]` of points; the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, TASKS * CLASSES))


@torch.no_grad()
def percent_right(model: nn.Module, task: int) -> str:
    """How much of a task a model knows."""
    points, labels = rows_of(task, 500, seed=0)
    return f"{100 * (model(points).argmax(dim=1) == labels).float().mean():.0f} %"
