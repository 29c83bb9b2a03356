"""Saves of what changed: the rows of a checkpoint in several files, each written once.

The first save of a job writes all rows, each later one those that changed since. The files of earlier saves are linked
into the folder of the new one (hard links), so every folder is whole by itself and older ones may go.
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

from rehearsal_plugin.checkpoint.format import VERSION, Content, Place, peek, places, read, write
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import CheckpointError

__all__ = ["Chain", "Increment", "Whole", "read_whole", "remove_unused"]

ROWS = "buffer.rows"
MOST_PARTS = 64
"""Of a checkpoint; then all rows are written anew."""

TOKEN = re.compile(r"[0-9a-f]{16}")
NAME = re.compile(r"rehearsal-step\d{1,18}-rank(\d{1,9})-of-(\d{1,9})-[0-9a-f]{16}\.rows\.safetensors")


@dataclass(frozen=True)
class Part:
    """A file of rows.

    Attributes:
        place: Of the checkpoint for which it was written.
        token: Makes its name unlike any other.
        rows: How many it has.
    """

    place: Place
    token: str
    rows: int

    @property
    def name(self) -> str:
        """The file's name in the checkpoint's folder."""
        stem = self.place.name.removesuffix(".safetensors")
        return f"{stem}-{self.token}.rows.safetensors"

    @property
    def partial(self) -> str:
        """See `Named.partial`."""
        return self.place.partial


@dataclass(frozen=True)
class Chain:
    """Where the rows of the last save lie: all of them in the first file, changes in the others, oldest first."""

    folder: Path
    parts: tuple[Part, ...]

    def goes_on(self, place: Place, count: int, changed: int) -> bool:
        """Whether another part is better than all `count` rows anew, of which `changed` changed."""
        old = self.parts[0].place
        alike = (old.rank, old.size) == (place.rank, place.size)
        changes = changed + sum(part.rows for part in self.parts[1:])
        return alike and len(self.parts) < MOST_PARTS and changes < count

    def link(self, folder: Path) -> bool:
        """Have the files in `folder` too; tells whether it could be done."""
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
class Whole:
    """A save to be written: one file with everything."""

    folder: Path
    place: Place
    content: Content

    def copied(self) -> Whole:
        """The same in memory of its own."""
        return replace(self, content=self.content.copied())

    def write(self) -> None:
        """Write the file.

        Raises:
            CheckpointError: See `files.write`.
        """
        write(self.folder, self.place, self.content)


@dataclass(frozen=True)
class Increment:
    """A save to be written: a file with everything but the rows, and one with those that are not on disk yet."""

    folder: Path
    place: Place
    head: Content
    rows: Content
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, folder: Path, place: Place, content: Content, changed: IntArray, last: Chain | None) -> Increment:
        """Split a checkpoint.

        Args:
            folder: Where it goes.
            place: Which it is.
            content: All of it.
            changed: `[n]` int64, the slots that changed since `last`.
            last: The save before; None for none that could be gone on from.
        """
        rows = content.tensors[ROWS]
        whole = last is None or not last.goes_on(place, len(rows), len(changed)) or not last.link(folder)
        slots = np.arange(len(rows)) if whole else changed
        index = torch.from_numpy(slots)
        part = Part(place, secrets.token_hex(8), len(slots))
        parts = (part,) if whole or last is None else (*last.parts, part)
        listed = [[one.place.step, one.token, one.rows] for one in parts]
        head = Content(
            {**content.meta, "parts": listed},
            {name: tensor for name, tensor in content.tensors.items() if name != ROWS},
        )
        tensors = {"slots": index, "rows": rows if whole else rows[index]}
        return cls(folder, place, head, Content({"version": VERSION, "token": part.token}, tensors), parts)

    def copied(self) -> Increment:
        """The same in memory of its own."""
        return replace(self, head=self.head.copied(), rows=self.rows.copied())

    def write(self) -> Chain:
        """Write both files, the rows first: as long as the other is missing there is no checkpoint.

        Raises:
            CheckpointError: See `files.write`.
        """
        write(self.folder, self.parts[-1], self.rows)
        write(self.folder, self.place, self.head)
        return Chain(self.folder, self.parts)


def read_whole(folder: Path, place: Place) -> Content:
    """A rank's checkpoint, with its rows put together from as many files as they are in.

    Raises:
        CheckpointError: See `files.read`.
        LookupError, TypeError, ValueError: It contradicts itself.
    """
    content = read(folder, place)
    if "parts" not in content.meta:
        return content
    rows = _rows(folder, _parts(content.meta["parts"], place), content.meta["count"])
    return Content(content.meta, {**content.tensors, ROWS: rows})


def remove_unused(folder: Path, place: Place) -> None:
    """Remove this rank's files of rows that none of its checkpoints in the folder needs."""
    try:
        used = {part.name for one in places(folder) if _same(one.rank, place) for part in _noted(folder, one)}
    except (CheckpointError, LookupError, TypeError, ValueError):
        return  # whatever cannot be read may need them
    for entry in folder.iterdir():
        found = NAME.fullmatch(entry.name)
        if found and _same(int(found[1]), place) and entry.name not in used:
            entry.unlink(missing_ok=True)


def _same(rank: int, place: Place) -> bool:
    """Whether files of `rank` are this one's to remove; those of ranks that are no more, too."""
    return rank % place.size == place.rank


def _noted(folder: Path, place: Place) -> Sequence[Part]:
    meta = peek(folder, place)
    return _parts(meta["parts"], place) if "parts" in meta else ()


def _parts(listed: Any, place: Place) -> list[Part]:
    """The parts that a file lists; ValueError and the like where that is no list of parts."""
    parts = []
    for step, token, rows in listed:
        if type(step) is not int or type(rows) is not int or min(step, rows) < 0 or not TOKEN.fullmatch(token):
            raise ValueError(f"no file of rows: {step!r}, {token!r}, {rows!r}")
        parts.append(Part(replace(place, step=step), token, rows))
    return parts


def _rows(folder: Path, parts: Sequence[Part], count: int) -> Tensor:
    """`[count, row_bytes]` uint8; the first part has a row for every slot it knows, later ones overwrite and add."""
    if type(count) is not int or not 0 <= count <= sum(part.rows for part in parts):
        raise ValueError(f"{count!r} rows in files of {[part.rows for part in parts]}")
    whole: Tensor | None = None
    present = np.zeros(0, dtype=bool)
    for part in parts:
        content = read(folder, part)
        slots, rows = content.tensors["slots"].numpy(), content.tensors["rows"]
        if content.meta["token"] != part.token or not len(slots) == len(rows) == part.rows or slots.dtype != np.int64:
            raise ValueError(f"{part.name} is not what it should be")
        if whole is None:
            whole, present = rows.new_zeros((count, rows.shape[1])), np.zeros(count, dtype=bool)
        if (slots < 0).any():
            raise ValueError(f"{part.name} has rows at no place")
        if (slots >= count).any():  # a buffer that was rolled back has fewer than it had
            there = np.flatnonzero(slots < count)
            slots, rows = slots[there], rows[torch.from_numpy(there)]
        whole[torch.from_numpy(slots)] = rows
        present[slots] = True
    if whole is None or not present.all():
        raise ValueError("rows that no file has")
    return whole
