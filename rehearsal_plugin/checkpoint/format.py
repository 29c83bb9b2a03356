"""One rank's checkpoint as a file: safetensors with a version and a checksum, written aside and then renamed.

Nothing is unpickled, and no header is trusted before it is checked: its length is bounded, safetensors compares the
sizes with the length of the file, and the checksum covers names, shapes and every byte.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rehearsal_plugin.buffer.rows.trimming import TrimmedRows
from rehearsal_plugin.errors import CheckpointError

__all__ = [
    "VERSION",
    "Content",
    "NamedFile",
    "RankFile",
    "Stamp",
    "checksum",
    "list_files",
    "read_file",
    "read_header",
    "read_stamp",
    "write_file",
]

VERSION = 1
LONGEST_HEADER = 16 << 20
"""Bytes. A header takes some kilobytes even for millions of rows, as all that grows with them is in tensors."""

NAME = re.compile(r"rehearsal-step(\d{1,18})-rank(\d{1,9})-of-(\d{1,9})\.safetensors")


class NamedFile(Protocol):
    """A file in the folder of a checkpoint."""

    @property
    def name(self) -> str:
        """The file's name."""

    @property
    def partial(self) -> str:
        """Name of the temporary folder in which it is written, one for all files of a rank."""


@dataclass(frozen=True, order=True)
class RankFile:
    """File of one rank's checkpoint, ordered by step.

    Attributes:
        step: Optimizer step at which it was saved.
        size: Number of ranks that saved.
        rank: Rank that saved it.
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
        """See `NamedFile.partial`."""
        return f"rehearsal-rank{self.rank}-of-{self.size}.partial"


@dataclass(frozen=True)
class Stamp:
    """Place of a checkpoint among those of its folder, see `timeline`.

    Attributes:
        run: The run that wrote it; None where it names none.
        number: Which save of the folder it was, from 1; 0 where that is not known.
    """

    run: str | None = None
    number: int = 0


@dataclass(frozen=True)
class Content:
    """Content of a file.

    Attributes:
        meta: JSON object in the header.
        tensors: Tensors on the CPU, by name.
        rows: Rows of different length by name; in the file each is two tensors, its bytes and its lengths.
        stamp: Who wrote it and when; the rest is alike for jobs that are alike.
    """

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    stamp: Stamp = Stamp()
    rows: Mapping[str, TrimmedRows] = field(default_factory=dict)

    def copied(self) -> Content:
        """A copy whose tensors share no memory with this one; that of trimmed rows never changes."""
        return replace(self, tensors={name: tensor.clone() for name, tensor in self.tensors.items()})

    def all_tensors(self) -> dict[str, Tensor]:
        """The tensors of the file."""
        packed = {name: rows.packed() for name, rows in self.rows.items()}
        lengths = {f"{name}.lengths": torch.from_numpy(rows.lengths) for name, rows in self.rows.items()}
        return {**self.tensors, **packed, **lengths}


def list_files(folder: Path) -> list[RankFile]:
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
    matches = filter(None, map(NAME.fullmatch, names))
    files = (RankFile(step=int(match[1]), size=int(match[3]), rank=int(match[2])) for match in matches)
    # A number with leading zeros has another name than its file.
    return sorted(rank_file for rank_file in files if rank_file.name in names and rank_file.rank < rank_file.size)


def write_file(folder: Path, rank_file: NamedFile, content: Content) -> Path:
    """Write a file that only its owner can read: all of it or nothing.

    The file is written in a temporary folder and moved out of it once it is on the disk. Remains of a job that died
    there are removed first. A folder that is removed meanwhile, as by a forked child that ends, is made again.

    Raises:
        CheckpointError: It cannot be written; an earlier file of that name stays.
    """
    path, partial = folder / rank_file.name, folder / rank_file.partial
    try:
        try:
            _write_whole(path, partial, content)
        except (OSError, SafetensorError):
            if partial.exists():
                raise
            _write_whole(path, partial, content)  # somebody removed the folder meanwhile
    except (OSError, ValueError, SafetensorError) as error:
        with suppress(OSError, ValueError):
            _remove_path(partial)
        raise CheckpointError(
            f"{path} cannot be written: {error}; the checkpoint before it is untouched. Make room or give another "
            "folder"
        ) from error
    return path


def _write_whole(path: Path, partial: Path, content: Content) -> None:
    text, stamp = json.dumps(content.meta, sort_keys=True), json.dumps(asdict(content.stamp))
    tensors = content.all_tensors()
    _remove_path(partial)
    partial.mkdir(parents=True, mode=0o700)
    sums = {"header": checksum(text, {}), "checksum": checksum(text, tensors)}
    if content.stamp != Stamp():
        sums |= {"stamp": stamp, "stamp_checksum": checksum(stamp + text, {})}
    unfinished = partial / path.name
    save_file(tensors, unfinished, {"rehearsal": text, **sums})
    unfinished.chmod(0o600)
    _fsync(unfinished)
    unfinished.replace(path)
    partial.rmdir()
    _fsync(path.parent)


def read_file(folder: Path, rank_file: NamedFile) -> Content:
    """Read a file and check it.

    Raises:
        CheckpointError: It is missing, cut off, changed, no checkpoint of this package, or of another version.
    """
    with _open_file(folder / rank_file.name) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        metadata = file.metadata() or {}
        return Content(_checked_meta(metadata, tensors), tensors, _stamp_of(metadata))


def read_header(folder: Path, rank_file: RankFile) -> dict[str, Any]:
    """Read and check the JSON of a file, without its tensors.

    Raises:
        CheckpointError: As for `read_file`.
    """
    with _open_file(folder / rank_file.name) as file:
        return _checked_meta(file.metadata() or {}, None)


def read_stamp(folder: Path, rank_file: RankFile) -> Stamp:
    """Read and check the stamp of a file; files of earlier releases have an empty one.

    Raises:
        CheckpointError: As for `read_file`.
    """
    with _open_file(folder / rank_file.name) as file:
        metadata = file.metadata() or {}
        _checked_meta(metadata, None)
        return _stamp_of(metadata)


@contextmanager
def _open_file(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > LONGEST_HEADER:
            raise ValueError(f"it claims a header of {length} bytes")
        with safe_open(path, framework="pt") as file_of_tensors:
            yield file_of_tensors
    except (OSError, struct.error, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; give another checkpoint") from error


def _checked_meta(metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None) -> dict[str, Any]:
    text = metadata.get("rehearsal")
    if text is None:
        raise ValueError("it is a safetensors file, and no rehearsal checkpoint")
    if metadata.get("header") != checksum(text, {}) or (
        tensors and metadata.get("checksum") != checksum(text, tensors)
    ):
        raise ValueError("it was changed since it was written (its checksum differs)")
    stamp = metadata.get("stamp")
    if metadata.get("stamp_checksum") != (None if stamp is None else checksum(stamp + text, {})):
        raise ValueError("it was changed since it was written (the checksum of its stamp differs)")
    meta = json.loads(text)
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        version = meta.get("version") if isinstance(meta, dict) else None
        raise ValueError(
            f"it has version {version!r} of the format, and this package reads version {VERSION}; read it with the "
            "package that wrote it"
        )
    return meta


def _stamp_of(metadata: Mapping[str, str]) -> Stamp:
    stamp = Stamp(**json.loads(metadata.get("stamp", "{}")))
    if not isinstance(stamp.run, (str, type(None))) or type(stamp.number) is not int or stamp.number < 0:
        raise ValueError(f"no stamp: {stamp}")
    return stamp


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b of the JSON and of name, dtype, shape and bytes of every tensor."""
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _remove_path(path: Path) -> None:
    """Remove a folder or a file, if there is one by that name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    """Force a file or a folder to the disk, so that it outlives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
