"""Injection at a model's forward: replayed rows join the arguments of a training pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rehearsal_plugin.rehearsal import Rehearsal

__all__ = ["ForwardInjection", "add_strategy_term", "needs_outputs"]


class ForwardInjection:
    """Adds replayed rows to the arguments of a model's forward, in training passes only.

    Fields of a row have the names of the model's parameters, for positional arguments too.

    Args:
        rehearsal: Source of the rows.
        module: The model.
    """

    def __init__(self, rehearsal: Rehearsal, module: nn.Module) -> None:
        self._rehearsal, self._module = rehearsal, module
        self._augmented = False
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        original = getattr(module, "_orig_mod", module)  # a compiled module takes any arguments
        parameters = inspect.signature(original.forward).parameters.values()
        self._parameters = [p.name for p in parameters if p.kind in kinds]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the model, with replayed rows in a training pass and without hidden fields in any.

        Raises:
            BatchError: The fields are not those of the first batch.
        """
        names = self._argument_names(len(args))
        if kwargs.keys() & names:  # an argument given twice: the model raises its own TypeError
            return args, kwargs
        batch = {**dict(zip(names, args, strict=True)), **kwargs}
        self._augmented = self._is_training
        fields = self._rehearsal.augment(batch) if self._augmented else self._rehearsal.visible(batch)
        return tuple(fields.pop(name) for name in names if name in fields), fields

    def finish(self, outputs: Any) -> Any:
        """The outputs for the caller; see `add_strategy_term`."""
        augmented, self._augmented = self._augmented, False
        return add_strategy_term(self._rehearsal, outputs) if augmented and needs_outputs(self._rehearsal) else outputs

    @property
    def _is_training(self) -> bool:
        return not self._rehearsal.closed and self._module.training and torch.is_grad_enabled()

    def _argument_names(self, count: int) -> list[str]:
        """Names of the first `count` positional arguments; numbers for those in `*args`."""
        return self._parameters[:count] + [str(i) for i in range(len(self._parameters), count)]


def needs_outputs(rehearsal: Rehearsal) -> bool:
    """Whether the strategy or the metrics use the model's outputs."""
    return rehearsal.strategy.records or not rehearsal.strategy.plain or rehearsal.measures


def add_strategy_term(rehearsal: Rehearsal, outputs: Any, scale: float = 1.0) -> Any:
    """The outputs of a training pass, with the strategy's term added to a loss that the model computed itself.

    Args:
        rehearsal: Rehearsal that augmented the batch.
        outputs: Outputs of the model.
        scale: Factor of the model's loss, against the mean over the micro-batch.

    Raises:
        ConfigError: The strategy needs the losses of new and replayed rows apart.
    """
    model_loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    return outputs if model_loss is None else rehearsal.complete(outputs, scale)
