"""One training pass through a model, as long as its batch may come again.

A pass is remembered until the next one after its backward, or until the end of the step. So the same batch gets the
same replayed rows when its activations are recomputed, or when it is given a second time before the backward pass.

In a job that gives batches again after their backward pass, as closures of SAM and LBFGS do, passes are remembered
until the end of the step, with a copy of the batch. A loader that fills the same memory anew is told from it by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.core.tree import leaves_of
from rehearsal_plugin.integrations.inject.output_watch import OutputWatch
from rehearsal_plugin.rehearsal import Rehearsal

__all__ = ["TrainingPass"]


class TrainingPass:
    """A batch that was given to a model, and the same with replayed rows.

    Args:
        rehearsal: Where the rows came from.
        given: The arguments by name, as the caller gave them.
        fields: The arguments of the model, with replayed rows.
        copied: Whether the batch's contents are kept too, see `is_unchanged`.

    Attributes:
        watch: Watches the outputs.
    """

    def __init__(
        self, rehearsal: Rehearsal, given: Mapping[str, Any], fields: Mapping[str, Any], *, copied: bool = False
    ) -> None:
        self.watch = OutputWatch(rehearsal)
        self._given, self._fields = dict(given), dict(fields)
        self._identity = {name: _identity(value) for name, value in given.items()}
        self._contents = [tensor.detach().clone() for tensor in _tensors_of(given)] if copied else None

    def is_of(self, given: Mapping[str, Any]) -> bool:
        """Whether these arguments have the very tensors of this pass, unchanged since."""
        if given.keys() != self._given.keys():
            return False
        identity = {name: _identity(value) for name, value in given.items()}
        return identity == self._identity and any(tensors is not None for tensors in identity.values())

    @property
    def is_unchanged(self) -> bool:
        """Whether the tensors hold what they held at first; False where it is not known."""
        contents = self._contents
        return contents is not None and all(
            torch.equal(tensor, content) for tensor, content in zip(_tensors_of(self._given), contents, strict=True)
        )

    def fields_for(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this pass, with what is no tensor, such as a flag, as it is given now."""
        return {
            name: value if self._identity[name] is not None else given[name] for name, value in self._fields.items()
        }

    def cuts_off(self, given: Mapping[str, Any]) -> bool:
        """Whether inputs were detached since, and gradients to what computed them would be lost."""
        return any(
            isinstance(value, Tensor) and value.grad_fn is not None and given[name] is not value
            for name, value in self._given.items()
        )


def _tensors_of(given: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in leaves_of(given).values() if isinstance(leaf, Tensor)]


def _identity(value: Any) -> Any:
    """Tells the very same tensors from others, also where they are detached; None for anything without tensors."""
    if isinstance(value, Tensor):
        return _identity_of_tensor(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return None
    tensors = [leaf for leaf in leaves_of(value).values() if isinstance(leaf, Tensor)]
    return tuple(map(_identity_of_tensor, tensors)) or None


def _identity_of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return id(tensor), version
    return tensor.data_ptr(), version, tensor.shape, tensor.dtype
