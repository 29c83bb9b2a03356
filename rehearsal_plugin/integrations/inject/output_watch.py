"""Gradients that come back to the outputs of a training pass: whether it is over, and whether its loss was a right one.

With rows injected at the model's forward, a loss outside the model knows no targets of replayed rows. It shows in the
first backward pass, unless `rehearsal.loss` was asked:

| outputs | gradient at a loss of the model | at other outputs, from outside | verdict |
|---|---|---|---|
| without a loss | | yes | refused within the backward pass |
| with a loss | no | yes | refused at the step: the script ignores the model's loss |
| with a loss | yes | yes, while another pass waits for its backward | refused: rows of the two do not belong together |
| with a loss | yes | yes | a warning: the term may need no targets, such as a penalty on logits |

Gradients from outside are told from those of the model's own loss by an alias: the caller gets a view of each output.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.core.tree import leaves_of, map_leaves
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.strategies.base import tensors_of

__all__ = ["OutputWatch", "loss_of"]

LOG = logging.getLogger(__name__)

ALWAYS_COMPARED, COMPARED_EVERY = 64, 64
"""Gradients on a GPU, and those beside a loss, are compared in the first micro-batches, then seldom: it takes time."""

CURE = (
    "rehearsal.inject is 'forward': replayed rows join inside the model's call, so targets outside are not theirs; set "
    "rehearsal.inject to 'loader', and iterate over rehearsal.loader(batches) of what attach() returned; or {}; or "
    "compute it with its loss(criterion, outputs, *targets) from outputs and targets that the model returns"
)
LOSS_OUTSIDE = "the loss is computed outside the model, from outputs without one, and " + CURE.format(
    "let the model return its loss"
)
LOSS_IGNORED = (
    "the loss that the model returned was not trained on, and a loss computed outside from its other outputs was; "
    + CURE.format("train on the returned loss")
)
ACROSS_PASSES = (
    "a loss outside the model is computed from outputs of a training pass while another one waits for its backward "
    "pass: their replayed rows are others, so rows of the two do not belong together; go backward after each pass, "
    "run a pass that trains nothing under torch.no_grad(), or set rehearsal.inject to 'loader'"
)
TERM_OUTSIDE = (
    "a term outside the model joins the loss that it returned, and rehearsal.inject is 'forward': replayed rows join "
    "inside the model's call; if the term compares outputs with anything of the batch, such as a teacher's outputs, "
    "set rehearsal.inject to 'loader'"
)


class OutputWatch:
    """Watches the outputs of one training pass. It holds neither the batch nor the outputs.

    Args:
        rehearsal: The rehearsal that augmented the batch, as its last one.

    Attributes:
        done: Whether a backward pass has reached the outputs.
        shared: Whether the outputs of another pass were alive before the backward pass of this one.
        repeated: Whether the batch was given again.
    """

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal, self._number = rehearsal, rehearsal.pending.expected
        self._without_loss: list[weakref.ref[Tensor]] = []
        self._loss: weakref.ref[Tensor] | None = None
        self._loss_used = self._outside_used = self._answered = False
        self.done = self.shared = self.repeated = False

    @property
    def is_dropped(self) -> bool:
        """Whether the batch was forgotten, or is one of an earlier step."""
        return self._rehearsal.pending.is_dropped(self._number)

    @property
    def open(self) -> bool:
        """Whether the outputs hold no loss and are alive, and nobody has asked for their loss or gone backward."""
        alive = any(output() is not None for output in self._without_loss)
        return alive and not self.done and self._rehearsal.pending.awaits(self._number)

    @property
    def waits(self) -> bool:
        """Whether the outputs hold a loss that is alive and has not gone backward."""
        return self._loss is not None and self._loss() is not None and not self.done

    def watch(self, outputs: Any, *, checked: bool, answered: bool = False) -> Any:
        """Watch the outputs of a call of the model; of several calls, where one recomputes another.

        Args:
            outputs: Of the model.
            checked: Whether a loss outside the model is refused.
            answered: Whether the loss among the outputs has the strategy's term already.

        Returns:
            The outputs for the caller.
        """
        loss = loss_of(outputs)
        if loss is not None:
            loss.register_hook(self._note)  # type: ignore[no-untyped-call]
            self._loss = weakref.ref(loss)
            return self._watch_beside(loss, outputs, answered) if self._is_compared else outputs
        for tensor in tensors_of(_as_nesting(outputs)).values():
            if tensor.grad_fn is not None:
                tensor.register_hook(self._check if checked else self._note)  # type: ignore[no-untyped-call]
                self._without_loss.append(weakref.ref(tensor))
        return outputs

    def check(self) -> None:
        """At the end of a step.

        Raises:
            BatchError: The model's loss was not trained on, and a loss outside was.
        """
        if not self._outside_used:
            return
        if not self._loss_used:
            raise BatchError(LOSS_IGNORED)
        if not self.repeated:  # else it may compare the passes of one batch
            _warn_of_term(self._rehearsal)

    @property
    def _is_compared(self) -> bool:
        return self._number <= ALWAYS_COMPARED or self._number % COMPARED_EVERY == 0

    def _watch_beside(self, loss: Tensor, outputs: Any, answered: bool) -> Any:
        """Watch all losses among the outputs, and aliases of all other tensors, which the caller gets."""
        self._answered = answered

        def watched(name: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.grad_fn is None:
                return leaf
            if leaf is loss or (not leaf.ndim and _is_name_of_loss(name)):
                leaf.register_hook(self._note_loss)  # type: ignore[no-untyped-call]
                return leaf
            if type(leaf) is not Tensor or not leaf.ndim or leaf.layout is not torch.strided:
                return leaf
            alias = leaf.view_as(leaf)
            alias.register_hook(self._note_outside)  # type: ignore[no-untyped-call]
            return alias

        checks = self._rehearsal.pending.step_checks
        if self.check not in checks:
            checks.append(self.check)
        return _map_outputs(outputs, watched)

    def _note(self, _: Tensor) -> None:
        self.done = True

    def _note_loss(self, gradient: Tensor | None) -> None:
        # Zeros come to a loss that is not used, too, out of a reentrant checkpoint.
        self._loss_used = self._loss_used or (gradient is not None and bool(gradient.any()))

    def _note_outside(self, gradient: Tensor | None) -> None:
        pending = self._rehearsal.pending
        unasked = self._answered or pending.awaits(self._number)
        if gradient is None or self._rehearsal.closed or not unasked or not _differs(gradient):
            return
        self._outside_used = True
        if self.shared:
            raise BatchError(ACROSS_PASSES)

    def _check(self, gradient: Tensor | None) -> None:
        self.done = True
        if gradient is None or (gradient.is_cuda and not self._is_compared):
            return
        if not self._rehearsal.closed and self._rehearsal.pending.awaits(self._number) and _differs(gradient):
            raise BatchError(LOSS_OUTSIDE)


_warned: weakref.WeakSet[Rehearsal] = weakref.WeakSet()


def _warn_of_term(rehearsal: Rehearsal) -> None:
    """Once for a rehearsal."""
    if rehearsal not in _warned:
        _warned.add(rehearsal)
        LOG.warning(TERM_OUTSIDE)


def _differs(gradient: Tensor) -> bool:
    """Whether the loss treats elements of the outputs unlike; a sum or mean of them needs no targets."""
    return bool(gradient.numel() and any(gradient.stride()) and gradient.amax() - gradient.amin() > 0)


def loss_of(outputs: Any) -> Tensor | None:
    """The loss among the outputs of a training pass, a scalar with a gradient; None without one.

    The `loss` of a mapping or object goes first. Otherwise any scalar counts whose name does not say that it is an
    auxiliary loss or a scale.
    """
    if isinstance(outputs, Tensor):
        return outputs if _is_loss(outputs) else None
    nesting = _as_nesting(outputs)
    loss = nesting.get("loss") if isinstance(nesting, Mapping) else None
    if isinstance(loss, Tensor) and loss.grad_fn is not None:
        return loss
    scalars = {name: leaf for name, leaf in leaves_of(nesting).items() if isinstance(leaf, Tensor) and _is_loss(leaf)}
    return next((leaf for name, leaf in scalars.items() if _is_name_of_loss(name)), None)


def _is_name_of_loss(name: str) -> bool:
    return "aux" not in name and "scale" not in name


def _is_loss(tensor: Tensor) -> bool:
    return tensor.ndim == 0 and tensor.grad_fn is not None


def _as_nesting(outputs: Any) -> Any:
    """The attributes of an object such as a dataclass; any other outputs as they are."""
    known = outputs is None or isinstance(outputs, (Tensor, Mapping, list, tuple))
    return outputs if known or not hasattr(outputs, "__dict__") else vars(outputs)


def _map_outputs(outputs: Any, function: Callable[[str, Any], Any]) -> Any:
    """The outputs with `function(name, leaf)` in place of every leaf; an object is copied."""
    nesting = _as_nesting(outputs)
    mapped = map_leaves(nesting, function)
    if nesting is outputs:
        return mapped
    twin = copy.copy(outputs)
    vars(twin).update(mapped)
    return twin
