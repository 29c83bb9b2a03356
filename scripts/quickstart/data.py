"""Two domains of real text that are on every machine with torch: Python source and C++ headers.

Python is the standard library, C++ the headers that come with torch. Files are taken in the order of a hash of
their relative path, so that the same installation gives the same bytes and a cut to a few megabytes is no
alphabetical corner; the same hash sends a tenth of the files to the held-out side. A batch depends on (seed, phase,
step, rank) alone, which is what lets two arms train on the same bytes without talking to each other.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LENGTH", "Corpus", "load_cpp", "load_python", "read"]

LENGTH = 256
"""Bytes of one window, and so the length of the model's context."""

TRAIN_BYTES = 8_000_000
HELD_OUT_BYTES = 1_000_000
SHARE_HELD_OUT = 10


@dataclass(frozen=True)
class Corpus:
    """One domain: the bytes to train on and those of files that training never sees (uint8, one dimension)."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]

    def batch(self, rows: int, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Random training windows as (input_ids, labels), int64 `[rows, LENGTH]`; the same for the same `key`."""
        starts = np.random.default_rng(key).integers(len(self.train) - LENGTH, size=rows)
        return _windows(self.train, starts)

    def held_out_batches(self, windows: int, rows: int, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of `windows` evenly spaced held-out windows, in batches of at most `rows`."""
        starts = np.linspace(0, len(self.held_out) - LENGTH - 1, windows, dtype=np.int64)[rank::ranks]
        for first in range(0, len(starts), rows):
            yield _windows(self.held_out, starts[first : first + rows])


def load_python() -> Corpus:
    """The `.py` files of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages"}
    return read(root, [path for path in root.rglob("*.py") if not foreign & set(path.relative_to(root).parts)])


def load_cpp() -> Corpus:
    """The C++ headers of the installed torch."""
    root = Path(torch.__file__).parent / "include"
    return read(root, [path for path in root.rglob("*") if path.suffix in {".h", ".hpp"}])


def read(root: Path, paths: list[Path]) -> Corpus:
    """The files `paths` under `root`, each on one side or the other.

    Raises:
        FileNotFoundError: too little text on one of the sides.
    """
    keys = {path: _key(path.relative_to(root)) for path in paths}
    ordered = sorted(paths, key=keys.__getitem__)
    held_out = [path for path in ordered if keys[path] % SHARE_HELD_OUT == 0]
    train = [path for path in ordered if keys[path] % SHARE_HELD_OUT != 0]
    try:
        return Corpus(_concatenate(train, TRAIN_BYTES), _concatenate(held_out, HELD_OUT_BYTES))
    except ValueError as error:
        raise FileNotFoundError(f"{root}: {error}; is this installation complete?") from error


def _key(relative: Path) -> int:
    return int.from_bytes(hashlib.sha256(relative.as_posix().encode()).digest()[:8], "big")


def _concatenate(paths: list[Path], limit: int) -> NDArray[np.uint8]:
    """The first `limit` bytes of the files, one after the other."""
    data = bytearray()
    for path in paths:
        data += path.read_bytes()
        if len(data) >= limit:
            break
    if len(data) <= LENGTH:
        raise ValueError(f"only {len(data)} bytes of text in {len(paths)} files")
    return np.frombuffer(bytes(data[:limit]), dtype=np.uint8)


def _windows(data: NDArray[np.uint8], starts: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(data[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
