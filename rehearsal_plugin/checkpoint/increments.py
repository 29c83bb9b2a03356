"""Incremental saves: the rows of a checkpoint lie in a chain of files, each written once.

The first save of a job writes all rows, each later one those that changed since. The files of earlier saves are
hard-linked into the folder of the new one, so every folder is complete by itself and older ones may be removed.

    save at step   file written   slots in it     chain that the main file lists
    10             A              0 1 2 3         A
    20             B                1             A, B
    30             C                1   3 4       A, B, C

A load of step 30 reads A, overwrites slot 1 with B, then slots 1 and 3 with C, and appends slot 4: slots 0 and 2 come
from A, the others from C. Slots may be appended by any file, and the files together have to cover all slots. The chain
starts anew, with all rows in one file, once its changes add up to as many rows as there are, or after `MOST_PARTS`.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.trimming import TrimmedRows
from rehearsal_plugin.buffer.storage import StoredRows
from rehearsal_plugin.checkpoint.format import (
    VERSION,
    Content,
    RankFile,
    read_file,
    read_header,
    write_file,
)
from rehearsal_plugin.checkpoint.layout_json import layout_from_json
from rehearsal_plugin.core.arrays import IntArray

__all__ = ["ROWS", "ROWS_NAME", "FullSave", "IncrementalSave", "RowsChain", "listed_parts", "read_checkpoint"]

ROWS = "buffer.rows"
"""Name of the rows in a file."""

MOST_PARTS = 64
"""Files in a chain; the next save then writes all rows."""

TOKEN = re.compile(r"[0-9a-f]{16}")
ROWS_NAME = re.compile(r"rehearsal-step\d{1,18}-rank(\d{1,9})-of-(\d{1,9})-[0-9a-f]{16}\.rows\.safetensors")


@dataclass(frozen=True)
class RowsFile:
    """One file of rows in a chain.

    Attributes:
        rank_file: Main file of the checkpoint for which it was written.
        token: Random text that makes its name unique.
        rows: Number of rows in it.
    """

    rank_file: RankFile
    token: str
    rows: int

    @property
    def name(self) -> str:
        """The file's name in the checkpoint's folder."""
        stem = self.rank_file.name.removesuffix(".safetensors")
        return f"{stem}-{self.token}.rows.safetensors"

    @property
    def partial(self) -> str:
        """See `NamedFile.partial`."""
        return self.rank_file.partial


@dataclass(frozen=True)
class RowsChain:
    """Files that hold the rows of the last save: all rows in the first, changes in the others, oldest first."""

    folder: Path
    parts: tuple[RowsFile, ...]

    def can_extend(self, rank_file: RankFile, count: int, changed: int) -> bool:
        """Whether the `changed` ones of `count` rows go into another part, instead of all rows into a new chain."""
        first = self.parts[0].rank_file
        same_rank = (first.rank, first.size) == (rank_file.rank, rank_file.size)
        changes = changed + sum(part.rows for part in self.parts[1:])
        return same_rank and len(self.parts) < MOST_PARTS and changes < count

    def link_into(self, folder: Path) -> bool:
        """Hard-link all files into `folder`; False if one cannot be linked, and then none is."""
        linked: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for part in self.parts:
                target = folder / part.name
                if not target.exists():
                    os.link(self.folder / part.name, target)
                    linked.append(target)
        except OSError:  # another file system, one without links, or the old folder is gone
            for target in linked:
                with suppress(OSError):
                    target.unlink()
            return False
        return True


@dataclass(frozen=True)
class FullSave:
    """A save that is to be written as one file."""

    folder: Path
    rank_file: RankFile
    content: Content

    @property
    def run(self) -> str | None:
        """The run that saves, see `timeline`."""
        return self.content.stamp.run

    def copied(self) -> FullSave:
        """A copy that shares no memory with the buffer."""
        return replace(self, content=self.content.copied())

    def write(self, number: int) -> None:
        """Write the file, as the save of this `number` in its folder.

        Raises:
            CheckpointError: As for `write_file`.
        """
        write_file(self.folder, self.rank_file, _numbered(self.content, number))


@dataclass(frozen=True)
class IncrementalSave:
    """A save that is to be written as two files: a head without rows, and the rows that are not on the disk yet."""

    folder: Path
    rank_file: RankFile
    head: Content
    rows: Content
    parts: tuple[RowsFile, ...]

    @classmethod
    def of(
        cls, folder: Path, rank_file: RankFile, content: Content, changed: IntArray, last: RowsChain | None
    ) -> IncrementalSave:
        """Split a checkpoint.

        Args:
            folder: Folder to write into.
            rank_file: Main file of the checkpoint.
            content: The whole checkpoint.
            changed: `[n]` int64, the slots that changed since `last`.
            last: Chain of the save before; None starts a new one.
        """
        trimmed = content.rows.get(ROWS)
        rows = content.tensors[ROWS] if trimmed is None else trimmed
        whole = last is None or not last.can_extend(rank_file, len(rows), len(changed)) or not last.link_into(folder)
        slots = np.arange(len(rows)) if whole else changed
        part = RowsFile(rank_file, secrets.token_hex(8), len(slots))
        parts = (part,) if whole or last is None else (*last.parts, part)
        listed = [[each.rank_file.step, each.token, each.rows] for each in parts]
        head = Content(
            {**content.meta, "parts": listed},
            {name: tensor for name, tensor in content.tensors.items() if name != ROWS},
            content.stamp,
        )
        written = Content({"version": VERSION, "token": part.token}, {"slots": torch.from_numpy(slots)})
        if isinstance(rows, Tensor):
            written.tensors["rows"] = rows if whole else rows[torch.from_numpy(slots)]
        else:
            written = replace(written, rows={"rows": rows.select(slots)})
        return cls(folder, rank_file, head, written, parts)

    @property
    def run(self) -> str | None:
        """The run that saves, see `timeline`."""
        return self.head.stamp.run

    def copied(self) -> IncrementalSave:
        """A copy that shares no memory with the buffer."""
        return replace(self, head=self.head.copied(), rows=self.rows.copied())

    def write(self, number: int) -> RowsChain:
        """Write both files as the save of this `number`, the rows first: without the head there is no checkpoint yet.

        Raises:
            CheckpointError: As for `write_file`.
        """
        write_file(self.folder, self.parts[-1], self.rows)
        write_file(self.folder, self.rank_file, _numbered(self.head, number))
        return RowsChain(self.folder, self.parts)


def read_checkpoint(folder: Path, rank_file: RankFile) -> Content:
    """Read a rank's checkpoint, and put its rows together from the files of its chain.

    Raises:
        CheckpointError: As for `read_file`.
        LookupError, TypeError, ValueError: It contradicts itself.
    """
    content = read_file(folder, rank_file)
    if "parts" not in content.meta:
        rows = _stored_rows(content, ROWS, content.meta["layout"])
        return content if isinstance(rows, Tensor) or rows is None else replace(content, rows={ROWS: rows})
    parts = _parse_parts(content.meta["parts"], rank_file)
    rows = _join_rows(folder, parts, content.meta["count"], content.meta["layout"])
    if isinstance(rows, Tensor):
        return replace(content, tensors={**content.tensors, ROWS: rows})
    return replace(content, rows={ROWS: rows})


def _numbered(content: Content, number: int) -> Content:
    return replace(content, stamp=replace(content.stamp, number=number))


def listed_parts(folder: Path, rank_file: RankFile) -> Sequence[RowsFile]:
    """The files of rows that a main file lists.

    Raises:
        CheckpointError: It cannot be read.
        TypeError, ValueError: It lists something else.
    """
    meta = read_header(folder, rank_file)
    return _parse_parts(meta["parts"], rank_file) if "parts" in meta else ()


def _parse_parts(listed: Any, rank_file: RankFile) -> list[RowsFile]:
    """The parts in the JSON of a main file; ValueError or TypeError where it lists none."""
    parts = []
    for step, token, rows in listed:
        if type(step) is not int or type(rows) is not int or min(step, rows) < 0 or not TOKEN.fullmatch(token):
            raise ValueError(f"no file of rows: {step!r}, {token!r}, {rows!r}")
        parts.append(RowsFile(replace(rank_file, step=step), token, rows))
    return parts


def _stored_rows(content: Content, name: str, layout: Any) -> StoredRows | None:
    """The rows called `name` in a file, `[n, row_bytes]` or trimmed; None where it has none."""
    rows, lengths = content.tensors.get(name), content.tensors.get(f"{name}.lengths")
    return rows if rows is None or lengths is None else TrimmedRows.of(layout_from_json(layout), rows, lengths.numpy())


def _join_rows(folder: Path, parts: list[RowsFile], count: int, layout: Any) -> StoredRows:
    """Rows `[count, row_bytes]` uint8: each part, oldest first, overwrites its slots or adds them."""
    if type(count) is not int or not 0 <= count <= sum(part.rows for part in parts):
        raise ValueError(f"{count!r} rows in files of {[part.rows for part in parts]}")
    slots, rows = zip(*(_read_part(folder, part, layout) for part in parts), strict=True) if parts else ((), ())
    origin, first = np.full(count, -1, dtype=np.int64), 0  # the last row of each slot, counted through all parts
    for part in slots:
        inside = np.flatnonzero(part < count)  # a buffer that was rolled back has fewer than it had
        origin[part[inside]] = first + inside
        first += len(part)
    if not parts or (origin < 0).any():
        raise ValueError("rows that no file has")
    trimmed = [part for part in rows if isinstance(part, TrimmedRows)]
    if trimmed:
        return TrimmedRows.joined(trimmed).select(origin)
    return _gather_rows([part for part in rows if isinstance(part, Tensor)], origin)


def _read_part(folder: Path, part: RowsFile, layout: Any) -> tuple[IntArray, StoredRows]:
    content = read_file(folder, part)
    slots, rows = content.tensors["slots"].numpy(), _stored_rows(content, "rows", layout)
    if content.meta["token"] != part.token or rows is None or not len(slots) == len(rows) == part.rows:
        raise ValueError(f"{part.name} is not what it should be")
    if slots.dtype != np.int64 or (slots < 0).any():
        raise ValueError(f"{part.name} has rows at no place")
    return slots, rows


def _gather_rows(parts: Sequence[Tensor], origin: IntArray) -> Tensor:
    """The rows at `origin` `[n]` of all parts together, part by part."""
    whole, first = parts[0].new_zeros((len(origin), parts[0].shape[1])), 0
    for rows in parts:
        slots = np.flatnonzero((origin >= first) & (origin < first + len(rows)))
        whole[torch.from_numpy(slots)] = rows[torch.from_numpy(origin[slots] - first)]
        first += len(rows)
    return whole
