"""Samples of WebDataset shards: tar files whose members with the same name, up to the first dot, are one sample."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rehearsal_plugin.checkpoint.convert.compressed import open_binary
from rehearsal_plugin.errors import DataError

__all__ = ["read_tar_samples"]

DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("txt", "text"), lambda data: data.decode("utf-8")),
    **dict.fromkeys(("cls", "cls2", "index", "id"), int),
    "json": json.loads,
    "npy": lambda data: np.load(io.BytesIO(data), allow_pickle=False),
}
END = 1024
"""Zero bytes that end a tar file."""


def read_tar_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Read samples: the value of each member under its ending, and of a JSON object each value under its key.

    Members with an ending that is not known, such as images, are left out.

    Raises:
        DataError: The file is cut off, or a member is not of the kind that its ending says.
    """
    if path.suffix == ".tar":
        _check_end(path)
    key: tuple[str, str] | None = None
    sample: dict[str, Any] = {}
    with open_binary(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            vars(archive)["members"].clear()  # it would remember all of them
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if not member.isfile() or not stem:
                continue
            if sample and key != (folder, stem):
                yield sample
                sample = {}
            key = (folder, stem)
            sample.update(_decode_member(path, archive, member, ending))
    if sample:
        yield sample


def _check_end(path: Path) -> None:
    """A file that was cut off between two members would look whole."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - END))
        if size < END or any(file.read(END)):
            raise DataError(f"{path} is empty, cut off, or no tar file; copy it again")


def _decode_member(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> dict[str, Any]:
    decode = DECODERS.get(ending.rpartition(".")[2])
    if decode is None:
        return {}
    data = archive.extractfile(member)
    try:
        value = decode(data.read() if data is not None else b"")
    except ValueError as error:
        raise DataError(f"member {member.name} of {path} cannot be read as {ending}: {error}") from error
    return value if isinstance(value, dict) else {ending: value}
