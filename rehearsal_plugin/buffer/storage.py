"""Rows at fixed slots: in memory, pinned memory, device memory or a file.

Where the rows are in host memory, a copy is one call for all rows, on one thread, and without the GIL if it takes a
while.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.allocator import zeros
from rehearsal_plugin.buffer.rows.copies import gather, scatter, warn_of_numpy
from rehearsal_plugin.buffer.rows.fields import Field, as_array, bytes_of, pick_rows, put
from rehearsal_plugin.buffer.rows.trimming import TrimmedRows
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.config.registries import STORAGES
from rehearsal_plugin.core.arrays import ByteArray, IntArray
from rehearsal_plugin.errors import StorageError

__all__ = [
    "DeviceStorage",
    "FileStorage",
    "HostStorage",
    "RowStorage",
    "StoredRows",
    "open_storage",
    "parts_of",
    "register",
]


StoredRows: TypeAlias = Tensor | TrimmedRows
"""Rows `[n, row_bytes]` uint8 as they lie in memory; `rows[index]` are padded ones."""


PART_BYTES = 4 << 20
"""Bytes of padded rows that are copied at a time."""


def parts_of(rows: StoredRows) -> Iterator[slice]:
    """The places of the rows, a few megabytes of padded ones at a time."""
    step = max(1, PART_BYTES // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


class RowStorage(Protocol):
    """`capacity` rows of `row_bytes` bytes at slots 0 to capacity - 1.

    Attributes:
        device: Where the rows live, and where the tensors given to `write` and `read` must live.
        row_bytes: Bytes a row.
    """

    device: torch.device
    row_bytes: int

    def write(self, slots: IntArray, rows: Tensor, places: IntArray | None = None) -> None:
        """Store rows `[m, row_bytes]` uint8 at `slots` `[n]` int64, all different.

        `places` `[n]` int64 tells which of the rows; None where it is all, in their order.
        """

    def write_fields(
        self, slots: IntArray, fields: Sequence[Field], columns: Sequence[Tensor], places: IntArray | None = None
    ) -> None:
        """The same of samples whose `fields` lie in `columns`, `[m, *shape]` each."""

    def read(self, slots: IntArray, out: Tensor) -> None:
        """Copy the rows at `slots` `[n]` int64 into `out` `[n, row_bytes]` uint8, contiguous."""

    def first(self, count: int) -> StoredRows:
        """The rows at slots 0 to `count - 1`, `[count, row_bytes]` uint8 in host memory; a view if they live there."""

    def copy(self, slots: IntArray) -> StoredRows:
        """The rows at `slots` `[n]` int64 in memory of their own, `[n, row_bytes]` uint8 on `device`."""


class HostStorage:
    """Rows in an array of host memory, plain or pinned."""

    device = torch.device("cpu")

    def __init__(self, array: ByteArray) -> None:
        self._array = array
        self.row_bytes = array.shape[1]

    def write(self, slots: IntArray, rows: Tensor, places: IntArray | None = None) -> None:
        """See `RowStorage.write`."""
        if rows.shape[1] != self.row_bytes:
            raise ValueError(f"rows of {rows.shape[1]} bytes instead of {self.row_bytes}")
        scatter(self._array, slots, [0], [as_array(rows)], places)

    def write_fields(
        self, slots: IntArray, fields: Sequence[Field], columns: Sequence[Tensor], places: IntArray | None = None
    ) -> None:
        """See `RowStorage.write_fields`."""
        put(self._array, slots, fields, columns, places)

    def read(self, slots: IntArray, out: Tensor) -> None:
        """See `RowStorage.read`."""
        gather(self._array, slots, out.numpy())

    def first(self, count: int) -> Tensor:
        """See `RowStorage.first`."""
        return torch.from_numpy(self._array[:count])

    def copy(self, slots: IntArray) -> Tensor:
        """See `RowStorage.copy`."""
        rows = torch.empty((len(slots), self.row_bytes), dtype=torch.uint8, device="cpu")
        self.read(slots, rows)
        return rows


class FileStorage(HostStorage):
    """Rows in a file that is mapped to memory, and may be larger than that.

    Before rows are touched, the kernel is asked for all their pages at once. Otherwise it would fetch them one by one
    as they are touched, each with as many pages around it that nobody wants.
    """

    def __init__(self, mapped: mmap.mmap, shape: tuple[int, int]) -> None:
        super().__init__(np.frombuffer(mapped, dtype=np.uint8).reshape(shape))
        self._mapped = mapped

    def write(self, slots: IntArray, rows: Tensor, places: IntArray | None = None) -> None:
        """See `RowStorage.write`."""
        self._fetch_pages(slots)
        super().write(slots, rows, places)

    def write_fields(
        self, slots: IntArray, fields: Sequence[Field], columns: Sequence[Tensor], places: IntArray | None = None
    ) -> None:
        """See `RowStorage.write_fields`."""
        self._fetch_pages(slots)
        super().write_fields(slots, fields, columns, places)

    def read(self, slots: IntArray, out: Tensor) -> None:
        """See `RowStorage.read`."""
        self._fetch_pages(slots)
        super().read(slots, out)

    def _fetch_pages(self, slots: IntArray) -> None:
        starts = slots * self.row_bytes
        first = starts - starts % mmap.PAGESIZE
        with suppress(OSError):  # the kernel may be short of memory; it then fetches pages as they are touched
            for start, length in zip(first.tolist(), (starts + self.row_bytes - first).tolist(), strict=True):
                self._mapped.madvise(mmap.MADV_WILLNEED, start, length)


class DeviceStorage:
    """Rows in one tensor of device memory."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.device = rows.device
        self.row_bytes = rows.shape[1]

    def write(self, slots: IntArray, rows: Tensor, places: IntArray | None = None) -> None:
        """See `RowStorage.write`."""
        self._rows.index_copy_(0, torch.from_numpy(slots).to(self.device), pick_rows(rows, places))

    def write_fields(
        self, slots: IntArray, fields: Sequence[Field], columns: Sequence[Tensor], places: IntArray | None = None
    ) -> None:
        """See `RowStorage.write_fields`."""
        index = torch.from_numpy(slots).to(self.device)
        for field, column in zip(fields, columns, strict=True):
            if field.nbytes:
                cells = self._rows[:, field.offset : field.offset + field.nbytes]
                cells.index_copy_(0, index, pick_rows(bytes_of(column), places).to(self.device))

    def read(self, slots: IntArray, out: Tensor) -> None:
        """See `RowStorage.read`."""
        torch.index_select(self._rows, 0, torch.from_numpy(slots).to(self.device), out=out)

    def first(self, count: int) -> Tensor:
        """See `RowStorage.first`."""
        return self._rows[:count].cpu()

    def copy(self, slots: IntArray) -> Tensor:
        """See `RowStorage.copy`."""
        return self._rows[torch.from_numpy(slots).to(self.device)]


Opener: TypeAlias = Callable[[BufferConfig, tuple[int, int], int], RowStorage]
"""`opener(config, (capacity, row_bytes), rank) -> storage`, all rows zero: the bytes between fields are never written,
and are sent and saved."""


def register(name: str) -> Callable[[Opener], Opener]:
    """Make a storage available as `rehearsal.buffer.storage`; decorates its opener."""
    return STORAGES.register(name)


@register("memory")
def open_memory(_: BufferConfig, shape: tuple[int, int], rank: int) -> RowStorage:
    """Host memory."""
    return HostStorage(zeros(math.prod(shape)).reshape(shape))


@register("pinned")
def open_pinned(_: BufferConfig, shape: tuple[int, int], rank: int) -> RowStorage:
    """Page-locked host memory."""
    return HostStorage(torch.zeros(shape, dtype=torch.uint8, pin_memory=True, device="cpu").numpy())


@register("cuda")
def open_cuda(_: BufferConfig, shape: tuple[int, int], rank: int) -> RowStorage:
    """Memory of the current CUDA device."""
    return DeviceStorage(torch.zeros(shape, dtype=torch.uint8, device="cuda"))


@register("mmap")
def open_mmap(config: BufferConfig, shape: tuple[int, int], rank: int) -> RowStorage:
    """A file, mapped to memory."""
    return FileStorage(_map_file(Path(config.path or "."), shape, rank), shape)


def open_storage(config: BufferConfig, capacity: int, row_bytes: int, rank: int = 0) -> RowStorage:
    """Make the storage that the config asks for.

    Args:
        config: `storage` says where; `path` is the folder of a file-backed storage.
        capacity: Rows.
        row_bytes: Bytes a row.
        rank: Names the file of this rank.

    Raises:
        StorageError: The memory, the device or the disk space cannot be had.
    """
    if rank == 0:
        warn_of_numpy()
    try:
        opener: Opener = STORAGES[config.storage]
        return opener(config, (capacity, row_bytes), rank)
    except (MemoryError, RuntimeError, AssertionError, OSError, ValueError, OverflowError) as error:
        raise StorageError(
            f"rehearsal.buffer.storage '{config.storage}' cannot hold {capacity} rows of {row_bytes} bytes "
            f"({capacity * row_bytes / 2**30:.2f} GiB) on rank {rank}: {error}; lower rehearsal.buffer.capacity "
            "or choose another storage"
        ) from error


def _map_file(folder: Path, shape: tuple[int, int], rank: int) -> mmap.mmap:
    """A fresh file for this rank, readable by its owner only, with its blocks reserved."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"rows.rank{rank}.bin"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "r+b"):
        try:
            # Reserving now turns a full disk into an error here instead of a SIGBUS in the middle of a step.
            os.posix_fallocate(descriptor, 0, shape[0] * shape[1])
        except (OSError, OverflowError):
            path.unlink(missing_ok=True)  # it may hold all the space that was left
            raise
        # Not by its path, which a rank of the same number in another group may have taken meanwhile.
        return mmap.mmap(descriptor, shape[0] * shape[1])
