"""One rank's checkpoint as a file: safetensors with a version and a checksum, written beside and then renamed.

Nothing is ever unpickled, and nothing that a header says is believed before it is checked: its length is bounded,
safetensors holds the sizes against the length of the file, and the checksum covers names, shapes and every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rehearsal_plugin.errors import CheckpointError

__all__ = ["VERSION", "Content", "Named", "Place", "find_set", "peek", "places", "read", "write"]

VERSION = 1
LONGEST_HEADER = 16 << 20
"""Bytes; the state of millions of rows has a header of some kilobytes, for what grows with them is in tensors."""

NAME = re.compile(r"rehearsal-step(\d{1,18})-rank(\d{1,9})-of-(\d{1,9})\.safetensors")


class Named(Protocol):
    """What has a file of its own in the folder of a checkpoint."""

    @property
    def name(self) -> str:
        """The file's name."""

    @property
    def partial(self) -> str:
        """The name of the folder in which it is written, one for all files of a rank."""


@dataclass(frozen=True, order=True)
class Place:
    """The file of a rank's checkpoint.

    Attributes:
        step: Of the state in it.
        size: Ranks that saved.
        rank: Whose it is.
    """

    step: int
    size: int
    rank: int

    @property
    def name(self) -> str:
        """The file's name in the checkpoint's folder."""
        return f"rehearsal-step{self.step}-rank{self.rank}-of-{self.size}.safetensors"

    @property
    def partial(self) -> str:
        """See `Named.partial`."""
        return f"rehearsal-rank{self.rank}-of-{self.size}.partial"


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        meta: JSON.
        tensors: On the CPU, by name.
    """

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def copied(self) -> Content:
        """The same with tensors of its own."""
        return Content(self.meta, {name: tensor.clone() for name, tensor in self.tensors.items()})


def places(folder: Path) -> list[Place]:
    """The files of all checkpoints in a folder, oldest step first.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    try:
        names = {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}; name the folder of a checkpoint") from error
    found = (Place(int(one[1]), int(one[3]), int(one[2])) for one in map(NAME.fullmatch, names) if one)
    return sorted(place for place in found if place.name in names and place.rank < place.size)


def find_set(folder: Path, step: int | None = None) -> list[Place] | None:
    """The files of the newest checkpoint in a folder that has those of all ranks, by rank; None if there is none.

    Args:
        folder: Where to look.
        step: Only checkpoints of this step.

    Raises:
        CheckpointError: There are files, and none of the checkpoints is complete.
    """
    sets: dict[tuple[int, int], list[Place]] = {}
    for place in places(folder):
        if step in (None, place.step):
            sets.setdefault((place.step, place.size), []).append(place)
    whole = [files for (_, size), files in sets.items() if len(files) == size]
    if sets and not whole:
        step, size = max(sets)
        have = {file.rank for file in sets[step, size]}
        missing = next(rank for rank in range(size) if rank not in have)
        raise CheckpointError(
            f"{folder} has no complete rehearsal checkpoint: of step {step}, {len(have)} of {size} files are there, "
            f"and {Place(step, size, missing).name} is missing; copy the files of all ranks into one folder, or give "
            "an earlier checkpoint"
        )
    return max(whole, default=None)


def write(folder: Path, place: Named, content: Content) -> Path:
    """Write a file that only its owner can read: whole, or not at all.

    It is written in a folder of its own, and moved out of it. Whatever a job that died has left there goes first.

    Raises:
        CheckpointError: It cannot be written; what was there before stays.
    """
    path, partial = folder / place.name, folder / place.partial
    text = json.dumps(content.meta, sort_keys=True)
    try:
        _remove(partial)
        partial.mkdir(parents=True, mode=0o700)
        sums = {"header": checksum(text, {}), "checksum": checksum(text, content.tensors)}
        unfinished = partial / place.name
        save_file(content.tensors, unfinished, {"rehearsal": text, **sums})
        unfinished.chmod(0o600)
        _flush(unfinished)
        unfinished.replace(path)
        partial.rmdir()
        _flush(folder)
    except (OSError, ValueError, SafetensorError) as error:
        with suppress(OSError, ValueError):
            _remove(partial)
        raise CheckpointError(
            f"{path} cannot be written: {error}; the checkpoint before it is untouched. Make room or give another "
            "folder"
        ) from error
    return path


def read(folder: Path, place: Named) -> Content:
    """Read a file and check it.

    Raises:
        CheckpointError: It is missing, cut off, changed, no checkpoint of this package, or of another version.
    """
    with _opened(folder / place.name) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        return Content(_meta(file.metadata() or {}, tensors), tensors)


def peek(folder: Path, place: Place) -> dict[str, Any]:
    """The JSON of a file, checked; its tensors are neither read nor checked.

    Raises:
        CheckpointError: As for `read`.
    """
    with _opened(folder / place.name) as file:
        return _meta(file.metadata() or {}, None)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > LONGEST_HEADER:
            raise ValueError(f"it claims a header of {length} bytes")
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (OSError, struct.error, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; give another checkpoint") from error


def _meta(noted: Mapping[str, str], tensors: Mapping[str, Tensor] | None) -> dict[str, Any]:
    text = noted.get("rehearsal")
    if text is None:
        raise ValueError("it is a safetensors file, and no rehearsal checkpoint")
    if noted.get("header") != checksum(text, {}) or (tensors and noted.get("checksum") != checksum(text, tensors)):
        raise ValueError("it was changed since it was written (its checksum differs)")
    meta = json.loads(text)
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        version = meta.get("version") if isinstance(meta, dict) else None
        raise ValueError(
            f"it has version {version!r} of the format, and this package reads version {VERSION}; read it with the "
            "package that wrote it"
        )
    return meta


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b of the JSON and of name, dtype, shape and bytes of every tensor."""
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Remove a folder, or a file by that name, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have it on the disk, whatever happens to the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
