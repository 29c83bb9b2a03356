"""Gradients that come back to the outputs of a training pass: whether it is over, and whether its loss was a right one.

With rows injected at the model's forward, a loss outside the model knows no targets of replayed rows. It shows in the
first backward pass: a gradient arrives at outputs without a loss, and `rehearsal.loss` was not asked.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rehearsal_plugin.core.tree import leaves_of
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.strategies.base import tensors_of

__all__ = ["OutputWatch", "loss_of"]

ALWAYS_COMPARED, COMPARED_EVERY = 64, 64
"""Gradients on a GPU are compared in the first micro-batches, then seldom: the host waits for the device to do so."""

LOSS_OUTSIDE = (
    "the loss is computed outside the model, from outputs without one, and rehearsal.inject is 'forward': replayed "
    "rows join inside the model's call, so targets outside are not theirs; set rehearsal.inject to 'loader', with "
    "handle.loader(...) around the training batches, or let the model return its loss, or compute it with "
    "rehearsal.loss(criterion, outputs, *targets) (handle.loss) from outputs and targets that the model returns"
)


class OutputWatch:
    """Watches the outputs of one training pass. It holds neither the batch nor the outputs.

    Args:
        rehearsal: The rehearsal that augmented the batch, as its last one.

    Attributes:
        done: Whether a backward pass has reached the outputs.
    """

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal, self._number = rehearsal, rehearsal.pending.expected
        self._without_loss: list[weakref.ref[Tensor]] = []
        self.done = False

    @property
    def open(self) -> bool:
        """Whether the outputs hold no loss and are alive, and nobody has asked for their loss or gone backward."""
        alive = any(output() is not None for output in self._without_loss)
        return alive and not self.done and self._rehearsal.pending.awaits(self._number)

    def watch(self, outputs: Any, *, checked: bool) -> None:
        """Watch the outputs of a call of the model; of several calls, where one recomputes another.

        Args:
            outputs: Of the model.
            checked: Whether a loss outside the model is refused.
        """
        loss = loss_of(outputs)
        if loss is not None:
            loss.register_hook(self._note)  # type: ignore[no-untyped-call]
            return
        for tensor in tensors_of(_as_nesting(outputs)).values():
            if tensor.grad_fn is not None:
                tensor.register_hook(self._check if checked else self._note)  # type: ignore[no-untyped-call]
                self._without_loss.append(weakref.ref(tensor))

    def _note(self, _: Tensor) -> None:
        self.done = True

    def _check(self, gradient: Tensor) -> None:
        self.done = True
        if not self._rehearsal.closed and self._rehearsal.pending.awaits(self._number) and self._differs(gradient):
            raise BatchError(LOSS_OUTSIDE)

    def _differs(self, gradient: Tensor) -> bool:
        """Whether the loss treats elements of the outputs unlike; a sum or mean of them needs no targets."""
        if not gradient.numel() or not any(gradient.stride()):
            return False
        if gradient.is_cuda and self._number > ALWAYS_COMPARED and self._number % COMPARED_EVERY:
            return False
        return bool(gradient.amax() - gradient.amin() > 0)


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
    return next((leaf for name, leaf in scalars.items() if "aux" not in name and "scale" not in name), None)


def _is_loss(tensor: Tensor) -> bool:
    return tensor.ndim == 0 and tensor.grad_fn is not None


def _as_nesting(outputs: Any) -> Any:
    """The attributes of an object such as a dataclass; any other outputs as they are."""
    known = outputs is None or isinstance(outputs, (Tensor, Mapping, list, tuple))
    return outputs if known or not hasattr(outputs, "__dict__") else vars(outputs)
