"""Reads of random rows from a file ten times as large as the page cache that is left for it.

    python -m scripts.benchmarks.file --json out/bench_file

Two storages over one file take turns: *ahead*, that of a buffer with `storage: mmap`, which asks the kernel for all
pages of the rows before it touches them; and *on demand*, which leaves it to the kernel to find out page by page.

The page cache is bounded by a memory cgroup, which takes root. The file lies in the folder for temporary files
(`TMPDIR` names another), which must be on a disk.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from rehearsal_plugin.buffer.storage import FileStorage
from rehearsal_plugin.core.arrays import IntArray
from scripts.benchmarks.measure import arguments_of, measure, publish, ratio
from scripts.common.tables import print_table

AHEAD, ON_DEMAND = "ahead", "on demand"
CHUNK = 16 << 20  # bytes that are written at a time


class OnDemand(FileStorage):
    """A storage that asks for nothing beforehand."""

    def _fetch_pages(self, slots: IntArray) -> None:
        pass


class Reads:
    """Reads of random rows, and the pages that were waited for one by one.

    Args:
        storage: Of `capacity` rows.
        capacity: Rows.
        drawn: Rows that are read at a time.
        seed: Of their draw; rows that another one has just read are in the page cache.
    """

    def __init__(self, storage: FileStorage, capacity: int, drawn: int, seed: int) -> None:
        self._storage, self._capacity = storage, capacity
        self._out = torch.zeros((drawn, storage.row_bytes), dtype=torch.uint8)
        self._rng = np.random.default_rng(seed)
        self.faults: list[int] = []

    def __call__(self) -> None:
        """One step."""
        slots = self._rng.integers(0, self._capacity, len(self._out))
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        self._storage.read(slots, self._out)
        self.faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before)


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes the report."""
    description = (__doc__ or "").partition("\n")[0]
    arguments = arguments_of(description, argv, rounds=101, cache_mb=400, times=10, row_kb=64, drawn=12)
    shape = ((arguments.times * arguments.cache_mb << 10) // arguments.row_kb, arguments.row_kb << 10)
    with tempfile.TemporaryDirectory() as folder, confined(arguments.cache_mb << 20):
        mapped = written(Path(folder) / "rows.bin", shape)
        reads = {
            name: Reads(kind(mapped, shape), shape[0], arguments.drawn, seed)
            for seed, (name, kind) in enumerate({AHEAD: FileStorage, ON_DEMAND: OnDemand}.items())
        }
        timings = measure(reads, arguments.rounds)
    rows = [
        {"reads": name, "file_mb": math.prod(shape) >> 20, "cache_mb": arguments.cache_mb, "row_bytes": shape[1],
         "drawn": arguments.drawn, "faults": float(np.mean(reads[name].faults)), **timing.row()}
        for name, timing in timings.items()
    ]  # fmt: skip
    print_table(
        "A step", ["", "ms", "major faults"], [[r["reads"], f"{r['ms']:.2f}", f"{r['faults']:.2f}"] for r in rows]
    )
    faster = ratio(timings[ON_DEMAND], timings[AHEAD]).median
    publish(arguments.json, {"ahead_vs_on_demand": faster, "major_faults": rows[0]["faults"]}, rows, ranks=1)
    return 0


def written(path: Path, shape: tuple[int, int]) -> mmap.mmap:
    """A file of random bytes, all of them on the disk, mapped to memory."""
    block = np.random.default_rng(0).integers(0, 256, CHUNK, dtype=np.uint8)
    left = math.prod(shape)
    with path.open("w+b") as file:
        while left:
            left -= file.write(block[:left].data)
            file.flush()
            os.fsync(file.fileno())
        return mmap.mmap(file.fileno(), 0)


@contextmanager
def confined(nbytes: int) -> Iterator[None]:
    """From here on this process, and the pages of files that it touches, get so much memory.

    Raises:
        SystemExit: There is no memory cgroup to be had.
    """
    old = Path("/sys/fs/cgroup/memory")
    home, limit = (old, "memory.limit_in_bytes") if old.is_dir() else (old.parent, "memory.max")
    group = home / f"rehearsal_plugin_{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(nbytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        raise SystemExit(
            f"the page cache cannot be bounded, which takes root and a memory cgroup in {home}: {error}"
        ) from error
    try:
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
