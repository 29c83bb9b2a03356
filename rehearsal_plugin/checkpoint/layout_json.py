"""Row layouts as JSON, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.fields import Field
from rehearsal_plugin.buffer.rows.layout import RowLayout

__all__ = ["layout_from_json", "layout_to_json"]

DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def layout_to_json(layout: RowLayout) -> dict[str, Any]:
    """Name, dtype and shape of every field, without the nesting of the batch, which the next batch brings."""
    pads = {"pads": dict(layout.pads), "rows_per_sample": layout.rows_per_sample} if layout.pads else {}
    return {"fields": _list_fields(layout.fields), "state": _list_fields(layout.state), **pads}


def layout_from_json(description: dict[str, Any]) -> RowLayout:
    """The layout with the same fields at the same offsets.

    Raises:
        KeyError: A key is missing, or torch has no such dtype.
        BatchError: There are no fields.
    """
    pads, rows = description.get("pads", {}), description.get("rows_per_sample", 1)
    layout = replace(RowLayout.infer(_empty_batch(description["fields"])), pads=pads, rows_per_sample=rows)
    return layout.with_state(_empty_batch(description["state"])) if description["state"] else layout


def _list_fields(fields: Iterable[Field]) -> list[list[Any]]:
    return [[field.name, str(field.dtype), list(field.shape)] for field in fields]


def _empty_batch(fields: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """An empty batch, one tensor `[0, *shape]` a field."""
    return {name: torch.empty((0, *shape), dtype=DTYPES[dtype], device="cpu") for name, dtype, shape in fields}
