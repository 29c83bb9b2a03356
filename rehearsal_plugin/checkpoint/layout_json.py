"""The fields of a row, as JSON and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.fields import Field
from rehearsal_plugin.buffer.rows.layout import RowLayout

__all__ = ["describe", "restore"]

DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def describe(layout: RowLayout) -> dict[str, Any]:
    """Name, dtype and shape of every field; the nesting of the batch comes from the next batch."""
    return {"fields": _listed(layout.fields), "state": _listed(layout.state)}


def restore(description: dict[str, Any]) -> RowLayout:
    """A layout with the same fields at the same places.

    Raises:
        KeyError: Something is missing, or there is no such dtype.
        BatchError: There are no fields.
    """
    layout = RowLayout.infer(_empty(description["fields"]))
    return layout.with_state(_empty(description["state"])) if description["state"] else layout


def _listed(fields: Iterable[Field]) -> list[list[Any]]:
    return [[field.name, str(field.dtype), list(field.shape)] for field in fields]


def _empty(fields: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """No rows at all, of the right form."""
    return {name: torch.empty((0, *shape), dtype=DTYPES[dtype]) for name, dtype, shape in fields}
