"""Injection at a model's forward: a training pass gets replayed rows with its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rehearsal_plugin.rehearsal import Rehearsal

__all__ = ["ForwardInjection", "finish", "needs_outputs"]


class ForwardInjection:
    """Adds replayed rows to the arguments of a model's forward, in training passes only.

    The fields of a row have the names of the model's parameters, whether an argument was given by position or
    by name.

    Args:
        rehearsal: Where rows come from.
        module: The model.
    """

    def __init__(self, rehearsal: Rehearsal, module: nn.Module) -> None:
        self._rehearsal, self._module = rehearsal, module
        self._augmented = False
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        written = getattr(module, "_orig_mod", module)  # what `torch.compile` returns takes anything
        parameters = inspect.signature(written.forward).parameters.values()
        self._parameters = [p.name for p in parameters if p.kind in kinds]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments to go on with; where this is no training pass, those given that are not hidden.

        Raises:
            BatchError: The batch does not look like the first one.
        """
        names = self._names(len(args))
        if kwargs.keys() & names:  # one argument twice: the model's own TypeError says it best
            return args, kwargs
        batch = {**dict(zip(names, args, strict=True)), **kwargs}
        self._augmented = self._training
        seen = self._rehearsal.augment(batch) if self._augmented else self._rehearsal.visible(batch)
        return tuple(seen.pop(name) for name in names if name in seen), seen

    def finish(self, outputs: Any) -> Any:
        """The outputs to return; see `finish`."""
        augmented, self._augmented = self._augmented, False
        return finish(self._rehearsal, outputs) if augmented and needs_outputs(self._rehearsal) else outputs

    @property
    def _training(self) -> bool:
        return not self._rehearsal.closed and self._module.training and torch.is_grad_enabled()

    def _names(self, count: int) -> list[str]:
        """The names of the first `count` positional arguments; their numbers where the model takes `*args`."""
        return self._parameters[:count] + [str(i) for i in range(len(self._parameters), count)]


def needs_outputs(rehearsal: Rehearsal) -> bool:
    """Whether anything is done with what a model gives."""
    return rehearsal.strategy.records or not rehearsal.strategy.plain or rehearsal.measures


def finish(rehearsal: Rehearsal, outputs: Any, scale: float = 1.0) -> Any:
    """Outputs of a training pass with the strategy's term in their loss, where the model computed one itself.

    Args:
        rehearsal: What the batch came from.
        outputs: What the model gave.
        scale: By what the model's loss is scaled, against the mean over the micro-batch.

    Raises:
        ConfigError: The strategy cannot go on from such a loss.
    """
    own_loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    return outputs if own_loss is None else rehearsal.complete(outputs, scale)
