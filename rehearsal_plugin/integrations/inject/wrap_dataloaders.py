"""Injection at every `DataLoader` of a script that is to be left untouched."""

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
    """A `DataLoader` as it iterates without this module."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iterate(self._loader)


iterate = DataLoader.__iter__


def wrap_data_loaders(rehearsal: Rehearsal, model: nn.Module) -> None:
    """Give the batches of every `DataLoader` replayed rows while `model` trains.

    A batch is one to train on if, when it is read, the model is in training mode and gradients are enabled; all
    others pass through, so that test data is neither stored nor changed.

    Args:
        rehearsal: Where rows come from.
        model: The model that is trained.
    """

    def training() -> bool:
        return model.training and torch.is_grad_enabled()

    def augmented(loader: DataLoader[Any]) -> Iterator[Any]:
        return iter(RehearsalLoader(Unwrapped(loader), rehearsal, active=training))

    DataLoader.__iter__ = augmented  # type: ignore[method-assign,assignment]
