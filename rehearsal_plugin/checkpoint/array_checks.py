"""Checks of arrays in loaded state; see `validation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rehearsal_plugin.checkpoint.account_checks import LARGEST

__all__ = ["check_array", "check_distinct"]


def check_array(
    value: Any, dtype: Any, shape: Sequence[int | None], least: int | None = None, most: int = LARGEST
) -> int:
    """Check an array with numbers from `least` to `most`; returns its length. None in `shape` is any length."""
    valid = isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == len(shape)
    if not valid or any(size not in (None, actual) for size, actual in zip(shape, value.shape, strict=True)):
        raise ValueError(f"no {np.dtype(dtype)} of shape {tuple(shape)}")
    if least is not None and value.size and not (least <= int(value.min()) and int(value.max()) <= most):
        raise ValueError(f"numbers that are not from {least} to {most}")
    return len(value)


def check_distinct(keys: Any) -> None:
    """Check that no partition stands twice."""
    if len(np.unique(keys)) != len(keys):
        raise ValueError("a partition that stands twice")
