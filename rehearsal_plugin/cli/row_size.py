"""Bytes of a row before a job runs: told, counted by its fields, or taken from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from torch import Tensor

from rehearsal_plugin.buffer.chunks import CHUNK_OPENERS
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.checkpoint import tools
from rehearsal_plugin.config.size import parse_size
from rehearsal_plugin.errors import CheckpointError

__all__ = ["RowSize", "field_bytes", "row_size"]

FIELD = re.compile(r"(?P<name>.+)=(?P<dtype>\w+)(?:\[(?P<shape>\d{1,9}(?:,\d{1,9})*)?\])?")
ROWS = 2  # of the batch that the fields are tried with


@dataclass(frozen=True)
class RowSize:
    """Bytes of a row; the three differ where rows do in length.

    Attributes:
        stored: In a buffer, in the mean.
        moved: On its way between ranks, as long as the longest.
        padded: With as many positions as a row can have.
    """

    stored: int
    moved: int
    padded: int

    def held(self, storage: str) -> int:
        """Bytes that a row takes in a buffer with this `rehearsal.buffer.storage`."""
        return self.stored if storage in CHUNK_OPENERS else self.padded


def row_size(text: str | None, fields: Sequence[str], checkpoint: Path | None) -> RowSize:
    """Bytes of a row, by the one of the three that is given.

    Args:
        text: Bytes, or a size with a unit.
        fields: See `field_bytes`.
        checkpoint: Folder whose rows have the size.

    Raises:
        typer.BadParameter: None or several are given, or one cannot be read.
        CheckpointError: There is no checkpoint, or it has no row.
    """
    if [text is not None, bool(fields), checkpoint is not None].count(True) != 1:
        raise typer.BadParameter(
            "tell the bytes of a row by one of: --row-bytes BYTES, --field NAME=DTYPE[SHAPE] for each field of a "
            "sample, or --rows-of CHECKPOINT"
        )
    if checkpoint is not None:
        return _checkpoint_bytes(checkpoint)
    size = field_bytes(fields) if text is None else _parsed_bytes(text)
    return RowSize(size, size, size)


def field_bytes(fields: Sequence[str]) -> int:
    """Bytes of a row with these fields, as a buffer lays them out.

    Args:
        fields: `NAME=DTYPE[SHAPE]` of one sample each, such as `input_ids=int64[1024]` or `label=int64`.

    Raises:
        typer.BadParameter: One has another form.
    """
    batch = dict(_parsed_field(field) for field in fields)
    return RowLayout.infer(batch, only=batch.keys()).row_bytes


def _parsed_bytes(text: str) -> int:
    size = int(text) if text.isdecimal() else parse_size(text)
    if not size:
        raise typer.BadParameter(f"--row-bytes is '{text}'; give bytes above 0, or a size such as '16KiB'")
    return size


def _parsed_field(text: str) -> tuple[str, Tensor]:
    match = FIELD.fullmatch(text)
    dtype = None if match is None else getattr(torch, match["dtype"], None)
    if match is None or not isinstance(dtype, torch.dtype):
        raise typer.BadParameter(
            f"--field takes NAME=DTYPE or NAME=DTYPE[SHAPE] of one sample, such as input_ids=int64[1024], and not "
            f"'{text}'"
        )
    shape = [int(length) for length in (match["shape"] or "").split(",") if length]
    # Expanded from one entry, as only shapes and dtypes are asked for.
    return match["name"], torch.zeros([1] * (len(shape) + 1), dtype=dtype).expand(ROWS, *shape)


def _checkpoint_bytes(folder: Path) -> RowSize:
    told = tools.inspect(folder)
    if not told["rows"]:
        raise CheckpointError(f"{folder} holds no rows yet, so the bytes of one are not known; give --row-bytes")
    return RowSize(-(-told["bytes"] // told["rows"]), told["sent_bytes"], told["row_bytes"])
