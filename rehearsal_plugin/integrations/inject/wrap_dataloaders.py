"""Injection at every `DataLoader` of a process, so that a script needs no change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from rehearsal_plugin.integrations.inject.loader import RehearsalLoader
from rehearsal_plugin.rehearsal import Rehearsal

__all__ = ["wrap_data_loaders"]


class Unwrapped:
    """A `DataLoader` with its original iterator."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iterate(self._loader)


iterate = DataLoader.__iter__


def wrap_data_loaders(rehearsal: Rehearsal, model: nn.Module) -> None:
    """Add replayed rows to the batches of every `DataLoader` while `model` trains.

    This patches `DataLoader.__iter__` for the whole process. A batch is a training batch if the model is in training
    mode and gradients are enabled when it is read. All other batches pass through, so test data is neither stored nor
    changed.

    Args:
        rehearsal: Source of the rows.
        model: The model that is trained.
    """

    def training() -> bool:
        return model.training and torch.is_grad_enabled()

    def iterate_augmented(loader: DataLoader[Any]) -> Iterator[Any]:
        return iter(RehearsalLoader(Unwrapped(loader), rehearsal, active=training))

    DataLoader.__iter__ = iterate_augmented  # type: ignore[method-assign,assignment]
