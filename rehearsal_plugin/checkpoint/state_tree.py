"""Nested state as JSON and named tensors, and back.

{"a": {"b": tensor}, "c": 1}  <->  {"a": {"b": {"$tensor": "a.b"}}, "c": 1}  and  {"a.b": tensor}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["State", "flatten_state", "unflatten_state"]

State: TypeAlias = Mapping[str, Any]
"""Nested mappings of tensors, numpy arrays and JSON values."""

TENSOR, ARRAY = "$tensor", "$array"


def flatten_state(state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state with a mark for every tensor and array, and these by dotted name, contiguous on the CPU."""
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item, f"{name}.{key}" if name else key) for key, item in value.items()}
        if isinstance(value, (Tensor, np.ndarray)):
            tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            tensor = tensor.detach().cpu().contiguous()
            address = tensor.untyped_storage().data_ptr()
            tensors[name] = (
                tensor.clone() if address in memory else tensor
            )  # safetensors refuses tensors that share memory
            memory.add(address)
            return {TENSOR if isinstance(value, Tensor) else ARRAY: name}
        return value

    return plain(state, ""), tensors


def unflatten_state(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `flatten_state` took apart.

    Raises:
        KeyError: A tensor is missing.
    """
    if not isinstance(plain, Mapping):
        return plain
    if plain.keys() == {TENSOR}:
        return tensors[plain[TENSOR]]
    if plain.keys() == {ARRAY}:
        return tensors[plain[ARRAY]].numpy()
    return {key: unflatten_state(value, tensors) for key, value in plain.items()}
