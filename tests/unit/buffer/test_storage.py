"""Rows at fixed slots: one conformance suite for every place, and what cannot be had."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.storage import DeviceStorage, FileStorage, HostStorage, RowStorage, open_storage
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.errors import StorageError

CAPACITY, ROW_BYTES = 50, 48

PLACES = [
    "memory",
    "mmap",
    "device tensor",
    pytest.param("pinned", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=PLACES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> RowStorage:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "device tensor":  # the code of `cuda` on a device that every machine has
        return DeviceStorage(torch.empty((CAPACITY, ROW_BYTES), dtype=torch.uint8))
    return open_storage(settings_of(request.param, tmp_path), CAPACITY, ROW_BYTES)


def settings_of(place: str, folder: Path) -> BufferConfig:
    path = {"path": str(folder)} if place == "mmap" else {}
    return BufferConfig.model_validate({"storage": place, **path})


def open_like(storage: RowStorage, row_bytes: int, folder: Path) -> RowStorage:
    """A storage of the same kind for rows of another size."""
    if isinstance(storage, FileStorage):
        return open_storage(settings_of("mmap", folder), CAPACITY, row_bytes)
    if isinstance(storage, DeviceStorage):
        return DeviceStorage(torch.zeros((CAPACITY, row_bytes), dtype=torch.uint8, device=storage.device))
    return open_storage(BufferConfig(), CAPACITY, row_bytes)


def random_rows(count: int, storage: RowStorage, seed: int = 0) -> Tensor:
    rows = np.random.default_rng(seed).integers(0, 256, (count, ROW_BYTES), dtype=np.uint8)
    return torch.from_numpy(rows).to(storage.device)


def read(storage: RowStorage, slots: IntArray) -> Tensor:
    out = torch.empty((len(slots), ROW_BYTES), dtype=torch.uint8, device=storage.device)
    storage.read(slots, out)
    return out


# Every storage


def test_rows_are_read_where_they_were_written(storage: RowStorage) -> None:
    slots, rows = np.random.default_rng(1).permutation(CAPACITY), random_rows(CAPACITY, storage)
    storage.write(slots, rows)
    assert torch.equal(read(storage, slots), rows)


def test_rows_are_read_in_any_order_and_more_than_once(storage: RowStorage) -> None:
    rows = random_rows(CAPACITY, storage)
    storage.write(np.arange(CAPACITY), rows)
    assert torch.equal(read(storage, np.array([49, 0, 0, 7])), rows[[49, 0, 0, 7]])


def test_other_slots_are_left_alone(storage: RowStorage) -> None:
    rows, more = random_rows(CAPACITY, storage), random_rows(3, storage, seed=2)
    storage.write(np.arange(CAPACITY), rows)
    storage.write(np.array([4, 2, 30]), more)
    rows[[4, 2, 30]] = more
    assert torch.equal(read(storage, np.arange(CAPACITY)), rows)


def test_rows_and_slots_may_lie_apart(storage: RowStorage) -> None:
    rows = random_rows(8, storage)
    storage.write(np.arange(8)[::2], rows[::2])
    assert torch.equal(read(storage, np.arange(8)[::2]), rows[::2])


def test_rows_are_copied_in(storage: RowStorage) -> None:
    rows = random_rows(2, storage)
    storage.write(np.array([0, 1]), rows)
    expected = rows.clone()
    rows.zero_()
    assert torch.equal(read(storage, np.array([0, 1])), expected)


def test_rows_are_copied_out(storage: RowStorage) -> None:
    storage.write(np.array([0]), random_rows(1, storage))
    first = read(storage, np.array([0]))
    expected = first.clone()
    storage.write(np.array([0]), random_rows(1, storage, seed=3))
    assert torch.equal(first, expected)


def test_rows_are_read_into_the_front_of_a_larger_buffer(storage: RowStorage) -> None:
    rows = random_rows(3, storage)
    storage.write(np.arange(3), rows)
    larger = torch.zeros((8, ROW_BYTES), dtype=torch.uint8, device=storage.device)
    storage.read(np.arange(3), larger[:3])
    assert torch.equal(larger[:3], rows)
    assert not larger[3:].any()


def test_row_bytes_are_known(storage: RowStorage) -> None:
    assert storage.row_bytes == ROW_BYTES


def test_rows_of_another_length_are_refused(storage: RowStorage) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        storage.write(np.arange(2), random_rows(2, storage)[:, : ROW_BYTES // 2])


def test_samples_written_field_by_field_are_the_rows_that_packing_them_gives(
    storage: RowStorage, tmp_path: Path
) -> None:
    batch = {
        "half": torch.arange(8, dtype=torch.bfloat16, requires_grad=True),
        "conjugate": torch.randn(4, dtype=torch.complex64).conj(),
        "slice": torch.arange(8).reshape(4, 2)[:, 1],
        "every other": torch.arange(24).reshape(4, 6)[:, ::2],
        "transposed": torch.arange(24.0).reshape(3, 2, 4).permute(2, 0, 1),
        "alike": torch.tensor([True]).expand(4),
        "eighth": torch.arange(4.0).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(8).reshape(4, 2).to(torch.uint16),
        "none": torch.zeros(4, 0),
        "none of a half": torch.zeros(4, 0, dtype=torch.bfloat16),
    }
    batch["half"] = batch["half"].reshape(4, 2)
    layout = RowLayout.infer(batch)
    columns = layout.columns(batch)
    packed = torch.zeros((4, layout.row_bytes), dtype=torch.uint8, device=storage.device)
    layout.pack(columns, packed)
    wide = open_like(storage, layout.row_bytes, tmp_path / "wide")
    wide.write_fields(np.array([9, 0, 3, 7]), layout.fields, columns)
    written = torch.empty_like(packed)
    wide.read(np.array([9, 0, 3, 7]), written)
    assert torch.equal(written, packed)
    for name, field in layout.unpack(written.cpu()).items():
        given = batch[name].detach().resolve_conj().contiguous()
        assert field.contiguous().view(torch.uint8).equal(given.view(torch.uint8)), name


# Memory


@pytest.mark.parametrize("row_bytes", [16, 48, 4096])
def test_memory_begins_with_a_line_of_the_cache(row_bytes: int) -> None:
    """So that rows of whole lines are written without reading what they overwrite."""
    for capacity in range(1, 9):
        assert open_storage(BufferConfig(), capacity, row_bytes).first(1)[:].data_ptr() % 64 == 0


def test_memory_is_not_touched_before_it_is_used() -> None:
    """A buffer of 8 GiB costs nothing until rows are in it."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        pytest.skip("needs /proc")
    before = int(statistics.read_text().split()[1])
    storage = open_storage(BufferConfig(), 2**19, 2**12)
    assert storage.row_bytes == 2**12
    assert (int(statistics.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") < 2**26


@pytest.mark.parametrize("capacity", [2**56, 2**63 - 1], ids=["more than addresses", "more than an integer"])
def test_more_memory_than_there_is_says_how_much_was_asked_for_and_the_cure(capacity: int) -> None:
    with pytest.raises(StorageError, match=r"'memory'.* GiB\).*rank 3.*rehearsal\.buffer\.capacity"):
        open_storage(BufferConfig(), capacity, ROW_BYTES, rank=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("place", ["pinned", "cuda"])
def test_a_gpu_storage_without_a_gpu_is_refused_by_name(place: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"'{place}'"):
        open_storage(settings_of(place, tmp_path), CAPACITY, ROW_BYTES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_gpu_memory_than_there_is_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"'cuda'.*rehearsal\.buffer\.capacity"):
        open_storage(settings_of("cuda", tmp_path), 2**40, ROW_BYTES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_rows_are_page_locked(tmp_path: Path) -> None:
    storage = open_storage(settings_of("pinned", tmp_path), CAPACITY, ROW_BYTES)
    assert torch.from_numpy(storage._array).is_pinned()  # type: ignore[attr-defined]


# File


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_the_file_can_be_read_by_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        open_storage(settings_of("mmap", tmp_path), CAPACITY, ROW_BYTES)
    finally:
        os.umask(before)
    assert stat.S_IMODE(only_file(tmp_path).stat().st_mode) == 0o600


def test_a_new_folder_can_be_entered_by_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        open_storage(settings_of("mmap", tmp_path / "new"), CAPACITY, ROW_BYTES)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_the_disk_space_is_reserved_at_once(tmp_path: Path) -> None:
    open_storage(settings_of("mmap", tmp_path), 1000, 4096)
    assert only_file(tmp_path).stat().st_blocks * 512 >= 1000 * 4096


def test_the_rows_are_in_the_file(tmp_path: Path) -> None:
    storage = open_storage(settings_of("mmap", tmp_path), CAPACITY, ROW_BYTES)
    rows = random_rows(1, storage)
    storage.write(np.array([7]), rows)
    assert only_file(tmp_path).read_bytes()[7 * ROW_BYTES : 8 * ROW_BYTES] == rows.numpy().tobytes()


def test_every_rank_has_its_own_file(tmp_path: Path) -> None:
    storages = [open_storage(settings_of("mmap", tmp_path), CAPACITY, ROW_BYTES, rank) for rank in range(3)]
    for rank, storage in enumerate(storages):
        storage.write(np.array([0]), random_rows(1, storage, seed=rank))
    for rank, storage in enumerate(storages):
        assert torch.equal(read(storage, np.array([0])), random_rows(1, storage, seed=rank))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    first = open_storage(settings_of("mmap", tmp_path), CAPACITY, ROW_BYTES)
    rows = random_rows(1, first)
    first.write(np.array([0]), rows)
    second = open_storage(settings_of("mmap", tmp_path), CAPACITY, ROW_BYTES)
    second.write(np.array([0]), random_rows(1, second, seed=1))
    assert torch.equal(read(first, np.array([0])), rows)


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    open_storage(settings_of("mmap", tmp_path), CAPACITY, ROW_BYTES)
    name = only_file(tmp_path)
    name.unlink()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    name.symlink_to(victim)
    open_storage(settings_of("mmap", tmp_path), CAPACITY, ROW_BYTES)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("capacity", [2**53, 2**63 - 1], ids=["more than a file may hold", "more than an integer"])
def test_more_disk_than_there_is_says_the_cure(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(StorageError, match=r"'mmap'.*rehearsal\.buffer\.capacity"):
        open_storage(settings_of("mmap", tmp_path), capacity, ROW_BYTES)


def test_a_full_disk_is_an_error_at_the_start_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        os.ftruncate(descriptor, size // 2)  # a file system may keep what it had reserved
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left on device"):
        open_storage(settings_of("mmap", tmp_path), CAPACITY, ROW_BYTES)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="'mmap'"):
        open_storage(settings_of("mmap", tmp_path / "file"), CAPACITY, ROW_BYTES)


def major_faults() -> int:
    """How often this thread has waited for a page to be fetched."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def test_rows_that_are_not_in_memory_are_fetched_all_at_once_and_not_page_by_page(tmp_path: Path) -> None:
    row_bytes, slots = 16 * mmap.PAGESIZE + 16, np.arange(0, CAPACITY, 7)
    storage = open_storage(settings_of("mmap", tmp_path), CAPACITY, row_bytes)
    assert isinstance(storage, FileStorage)
    rows = torch.arange(CAPACITY * row_bytes).to(torch.uint8).reshape(CAPACITY, row_bytes)
    storage.write(np.arange(CAPACITY), rows)
    out = torch.zeros((len(slots), row_bytes), dtype=torch.uint8)
    faults = {}
    for way, read_rows in {"page by page": HostStorage.read, "at once": FileStorage.read}.items():
        evict(storage, tmp_path / "rows.rank0.bin")
        before = major_faults()
        read_rows(storage, slots, out)
        faults[way] = major_faults() - before
        assert torch.equal(out, rows[slots])
    if not faults["page by page"]:
        pytest.skip("this file system keeps its files in memory")
    assert faults["at once"] < faults["page by page"] / 2


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM, errno.EIO])
def test_a_kernel_that_will_not_fetch_ahead_fails_no_step(tmp_path: Path, code: int) -> None:
    class Unwilling:
        def madvise(self, *_: object) -> None:
            raise OSError(code, os.strerror(code))

    storage = open_storage(settings_of("mmap", tmp_path), CAPACITY, ROW_BYTES)
    assert isinstance(storage, FileStorage)
    storage._mapped = Unwilling()  # type: ignore[assignment]
    rows = random_rows(CAPACITY, storage)
    storage.write(np.arange(CAPACITY), rows)
    assert torch.equal(read(storage, np.arange(CAPACITY)), rows)


def evict(storage: FileStorage, path: Path) -> None:
    """Have none of the file in memory."""
    storage._mapped.flush()
    storage._mapped.madvise(mmap.MADV_DONTNEED)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
