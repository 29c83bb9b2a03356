"""Memory that grows and shrinks in chunks: runs of bytes are appended, and chunks with many dead bytes are emptied.

A log, as in a log-structured file system (Rosenblum and Ousterhout, 1992), with the greedy choice of what to clean::

    chunk 0   [ a b . . d . ]   half of its bytes are dead: a, b and d are appended to chunk 2, chunk 0 is given back
    chunk 1   [ e f . h i j ]
    chunk 2   [ k l a b d   ]   the one that is appended to

Invariants: bytes that were appended never change, and a chunk that was given back is never written again. So whoever
took the list of chunks and the places in them may read while others append or clean.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from rehearsal_plugin.buffer.rows.allocator import zeros
from rehearsal_plugin.buffer.rows.runs import Runs
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.core.arrays import ByteArray, IntArray
from rehearsal_plugin.errors import StorageError

__all__ = ["CHUNK_OPENERS", "Chunks", "NewChunk"]

DEAD_SHARE = 1 / 16
"""Dead bytes, as a part of the others, from which on a chunk is emptied."""

NO_BYTES: ByteArray = np.zeros(0, dtype=np.uint8)

NewChunk: TypeAlias = Callable[[int], ByteArray]
"""`new_chunk(nbytes) -> [nbytes]`; what is taken with it is given back when nothing refers to it any more."""


class Chunks:
    """Where runs of bytes are appended.

    Args:
        new_chunk: Makes one.
        nbytes: Bytes of a chunk, no fewer than of any run.

    Attributes:
        nbytes: As given.
        arrays: `[nbytes]` uint8 each, none for one that was given back; replaced as a whole when one comes or goes.
        live: Bytes that were appended and not released.
        held: Bytes of all chunks, up to the last that was appended in each.
    """

    def __init__(self, new_chunk: NewChunk, nbytes: int) -> None:
        self._new_chunk, self.nbytes = new_chunk, nbytes
        self.arrays: list[ByteArray] = []
        self._filled = np.zeros(0, dtype=np.int64)
        self._live = np.zeros(0, dtype=np.int64)
        self._free: list[int] = []
        self._current = -1
        self.live = self.held = 0

    def append(self, sizes: IntArray) -> tuple[IntArray, IntArray]:
        """Places for runs of `sizes` `[n]` bytes: their chunks and first bytes, `[n]` int64 each."""
        which, starts = np.empty(len(sizes), dtype=np.int64), np.empty(len(sizes), dtype=np.int64)
        ends, done = sizes.cumsum(), 0
        while done < len(sizes):
            if self._current < 0 or self._filled[self._current] + sizes[done] > self.nbytes:
                self._open()
            chunk, before = self._current, int(ends[done] - sizes[done])
            filled = int(self._filled[chunk])
            stop = int(ends.searchsorted(before + self.nbytes - filled, side="right"))
            which[done:stop] = chunk
            starts[done:stop] = filled + ends[done:stop] - sizes[done:stop] - before
            taken = int(ends[stop - 1]) - before
            self._filled[chunk] += taken
            self._live[chunk] += taken
            self.live += taken
            self.held += taken
            done = stop
        return which, starts

    def runs(self, which: IntArray, starts: IntArray) -> Runs:
        """The runs that begin at `starts` `[n]` of the chunks `which` `[n]`, whatever comes and goes later."""
        return Runs(self.arrays, which, starts)

    def release(self, which: IntArray, sizes: IntArray) -> None:
        """Count runs of `sizes` `[n]` in chunks `which` `[n]` as dead."""
        np.subtract.at(self._live, which, sizes)
        self.live -= int(sizes.sum())

    def to_clean(self) -> int | None:
        """The chunk with the most dead bytes, if there are too many of them; whose runs must then be moved."""
        if self.held - self.live <= self.live * DEAD_SHARE + self.nbytes:
            return None
        dead = self._filled - self._live
        dead[self._current] = -1
        return int(dead.argmax())

    def give_back(self, chunk: int) -> None:
        """Give back a chunk whose runs have all been moved or released."""
        arrays = self.arrays.copy()
        arrays[chunk] = NO_BYTES
        self.held -= int(self._filled[chunk])
        self._filled[chunk] = 0
        self._free.append(chunk)
        self.arrays = arrays

    def _open(self) -> None:
        """Take a new chunk to append to."""
        try:
            array = self._new_chunk(self.nbytes)
        except (MemoryError, RuntimeError, OSError, ValueError) as error:
            raise StorageError(
                f"the rehearsal buffer cannot have another {self.nbytes / 2**20:.1f} MiB beside "
                f"{self.held / 2**20:.1f} MiB that it holds: {error}; lower rehearsal.buffer.capacity, or choose "
                "another storage"
            ) from error
        arrays = self.arrays.copy()
        if self._free:
            self._current = self._free.pop()
            arrays[self._current] = array
        else:
            self._current = len(arrays)
            arrays.append(array)
            self._filled, self._live = np.append(self._filled, 0), np.append(self._live, 0)
        self.arrays = arrays


class _SpareChunk:
    """Makes chunks, the last of which is used again once nothing refers to it: fresh pages take longer than copies.

    It is safe as nobody slices a chunk: a view would not keep it, as numpy's views refer to the memory below.
    """

    def __init__(self, new_memory: NewChunk) -> None:
        self._new_memory = new_memory
        self._spare: list[ByteArray] = []

    def __call__(self, nbytes: int) -> ByteArray:
        try:
            memory = self._spare.pop()  # one atomic operation: the last reader may be on another thread
        except IndexError:
            memory = self._new_memory(nbytes)
        chunk = memory[:nbytes]
        weakref.finalize(chunk, self._give_back, memory).atexit = False
        return chunk

    def _give_back(self, memory: ByteArray) -> None:
        if not self._spare:
            self._spare.append(memory)


def _in_memory(config: BufferConfig, rank: int) -> NewChunk:
    return _SpareChunk(zeros)


def _pinned(config: BufferConfig, rank: int) -> NewChunk:
    return _SpareChunk(lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu").numpy())


def _in_files(config: BufferConfig, rank: int) -> NewChunk:
    """Each chunk is a file that its owner alone can read, and that has no name: it goes with its last reader."""
    folder = Path(config.path or ".")

    def new_chunk(nbytes: int) -> ByteArray:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"rows.rank{rank}.bin"
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "r+b"):
            path.unlink()
            os.posix_fallocate(descriptor, 0, nbytes)  # a full disk is an error here, and no SIGBUS later
            return np.frombuffer(mmap.mmap(descriptor, nbytes), dtype=np.uint8)

    return new_chunk


CHUNK_OPENERS: Mapping[str, Callable[[BufferConfig, int], NewChunk]] = {
    "memory": _in_memory,
    "pinned": _pinned,
    "mmap": _in_files,
}
"""How each storage of `rehearsal.buffer.storage` makes chunks, by the config and the rank; others keep padded rows."""
