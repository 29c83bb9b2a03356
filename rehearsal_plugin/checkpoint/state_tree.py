"""Nested state as named tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["State", "flatten", "unflatten"]

State: TypeAlias = Mapping[str, Any]
"""Mappings of tensors, numpy arrays, and what JSON can hold."""

TENSOR, ARRAY = "$tensor", "$array"


def flatten(state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state with every tensor and array replaced by a mark, and those by dotted name, contiguous on the CPU."""
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item, f"{name}.{key}" if name else key) for key, item in value.items()}
        if isinstance(value, (Tensor, np.ndarray)):
            tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            tensor = tensor.detach().cpu().contiguous()
            address = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if address in memory else tensor  # a file holds no memory twice
            memory.add(address)
            return {TENSOR if isinstance(value, Tensor) else ARRAY: name}
        return value

    return plain(state, ""), tensors


def unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` was given.

    Raises:
        KeyError: A tensor is missing.
    """
    if not isinstance(plain, Mapping):
        return plain
    if plain.keys() == {TENSOR}:
        return tensors[plain[TENSOR]]
    if plain.keys() == {ARRAY}:
        return tensors[plain[ARRAY]].numpy()
    return {key: unflatten(value, tensors) for key, value in plain.items()}
