"""Memory in chunks."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rehearsal_plugin.buffer.chunks import CHUNK_OPENERS, DEAD_SHARE, Chunks
from rehearsal_plugin.buffer.rows.allocator import zeros
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.core.arrays import ByteArray
from rehearsal_plugin.errors import StorageError


def sizes(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def test_runs_follow_each_other_and_do_not_cross_a_chunk() -> None:
    chunks = Chunks(zeros, 100)
    which, starts = chunks.append(sizes(40, 50, 20, 100, 30))
    assert which.tolist() == [0, 0, 1, 2, 3]
    assert starts.tolist() == [0, 40, 0, 0, 0]
    which, starts = chunks.append(sizes(70, 1))
    assert (which.tolist(), starts.tolist()) == ([3, 4], [30, 0])
    assert chunks.live == chunks.held == 311


def test_empty_runs_have_a_place() -> None:
    which, starts = Chunks(zeros, 8).append(sizes(0, 8, 0))
    assert (which.tolist(), starts.tolist()) == ([0, 0, 0], [0, 0, 8])


def test_the_chunk_with_most_dead_bytes_is_cleaned_and_used_again() -> None:
    chunks = Chunks(zeros, 100)
    chunks.append(np.full(40, 50, dtype=np.int64))  # 20 chunks
    for chunk in range(3):
        chunks.release(sizes(chunk), sizes(50))
    assert chunks.to_clean() is None  # 150 dead, and 1,850 / 16 + 100 are borne
    chunks.release(sizes(5, 5, 7), sizes(50, 50, 50))
    assert chunks.to_clean() == 5
    before = chunks.arrays
    chunks.give_back(5)
    assert len(before[5])  # whoever took the list may still read
    assert not len(chunks.arrays[5])
    which, _ = chunks.append(sizes(100))
    assert which.tolist() == [5]
    assert chunks.held <= chunks.live * (1 + DEAD_SHARE) + 200


def test_what_cannot_be_had_is_said_with_the_cure() -> None:
    def fail(_: int) -> ByteArray:
        raise MemoryError("no more")

    with pytest.raises(StorageError, match=r"no more; lower rehearsal\.buffer\.capacity"):
        Chunks(fail, 8).append(sizes(1))


def test_chunks_in_files_leave_nothing_behind(tmp_path: Path) -> None:
    config = BufferConfig.model_validate({"storage": "mmap", "path": str(tmp_path / "rows")})
    new_chunk = CHUNK_OPENERS["mmap"](config, 3)
    first, second = new_chunk(5000), new_chunk(5000)
    first[:], second[:] = 1, 2
    assert (first.min(), first.max(), second.min(), second.max()) == (1, 1, 2, 2)
    assert not list((tmp_path / "rows").iterdir())


def test_memory_of_a_chunk_is_used_again_once_nobody_reads_it() -> None:
    new_chunk = CHUNK_OPENERS["memory"](BufferConfig(), 0)
    first, second = new_chunk(1 << 12), new_chunk(1 << 12)
    places = [chunk.ctypes.data for chunk in (first, second)]
    assert len(set(places)) == 2
    third = new_chunk(1 << 12)  # while both are read
    assert third.ctypes.data not in places
    del first
    assert new_chunk(1 << 12).ctypes.data == places[0]
    assert len(new_chunk(1 << 12)) == 1 << 12


def test_one_chunk_is_kept_and_no_more() -> None:
    new_chunk = CHUNK_OPENERS["memory"](BufferConfig(), 0)
    tracemalloc.start()
    try:
        chunks = [new_chunk(1 << 20) for _ in range(8)]
        chunks.clear()
        assert tracemalloc.get_traced_memory()[0] < 1.5 * (1 << 20)
    finally:
        tracemalloc.stop()
