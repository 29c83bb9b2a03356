"""Files that go from rank to rank: who sends what, in bounded pieces, and what a failing disk does."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from rehearsal_plugin import Rehearsal, RehearsalConfig, Transport
from rehearsal_plugin.checkpoint.fetch import Copies, Transfer, schedule_rounds
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.runtime.lifecycle import Lifecycle
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import new_batch
from tests.helpers.thread_ranks import run_threads

PAIRS = st.tuples(st.integers(0, 40), st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[1] != pair[2])


@given(st.lists(PAIRS, max_size=12))
def test_every_file_arrives_whole_and_a_rank_has_one_piece_each_way(
    pairs: list[tuple[int, int, int]],
) -> None:
    transfers = [Transfer(str(number), *pair) for number, pair in enumerate(pairs)]
    arrived = dict.fromkeys(transfers, 0)
    for pieces in schedule_rounds(transfers, 7):
        assert len({piece[0].holder for piece in pieces}) == len(pieces)
        assert len({piece[0].reader for piece in pieces}) == len(pieces)
        for transfer, start, stop in pieces:
            assert start == arrived[transfer]
            assert stop - start <= 7
            arrived[transfer] = stop
    assert all(length == transfer.length for transfer, length in arrived.items())


def swap(transport: Transport) -> dict[int, bytes]:
    """Each rank sends its number to the next one, so many times."""
    config = RehearsalConfig.load({"exchange": {"timeout_s": 20}})
    rank, size = transport.rank, transport.size
    before = (rank - 1) % size
    lifecycle = Lifecycle(config, transport, Metrics(), draws=1)
    return lifecycle.swap_bytes({(rank + 1) % size: bytes([rank]) * rank}, {before: before} if before else {})


def test_bytes_reach_the_rank_that_they_are_for() -> None:
    assert run_threads(swap, 3) == [{2: b"\2\2"}, {}, {1: b"\1"}]


def test_a_file_that_became_shorter_is_read_as_zeros_and_remembered(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    copies = Copies(tmp_path, 0)
    assert copies.read(Transfer("file", 5, 0, 1), 1, 5) == b"bc\0\0"
    assert "has become shorter" in str(copies.failure)


@pytest.mark.parametrize("name", ["../elsewhere", "model.safetensors", "rehearsal-step1-rank0-of-2.safetensors/x"])
def test_only_files_of_checkpoints_are_written(name: str, tmp_path: Path) -> None:
    copies = Copies(tmp_path / "disk", 0)
    copies.append(name, b"bytes")
    assert isinstance(copies.failure, ValueError)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_gets_copies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # where a folder should be
    copies = Copies(tmp_path / "file", 0)
    copies.append("rehearsal-step1-rank0-of-2.safetensors", b"bytes")
    assert copies.failure is None
    assert tmp_path not in copies.folder.parents
    copies.remove()
    assert not copies.folder.exists()


def load_onto_a_full_disk(root: Path) -> str:
    """What a rank is told where the disk of rank 1 has no room for the copies."""
    rank, section = dist.get_rank(), {"buffer": {"capacity": 50}, "ratio": 0.25, "exchange": {"timeout_s": 20}}
    with Rehearsal(section) as rehearsal:
        for step in range(4):
            rehearsal.update(new_batch(rank, step, 8))
        rehearsal.save(root / "disk0")
    dist.barrier()
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with Rehearsal(section) as rehearsal:
        try:
            rehearsal.load(root / f"disk{rank}")
        except CheckpointError as error:
            return str(error)
    return ""


@pytest.mark.fault
def test_a_full_disk_is_an_error_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(load_onto_a_full_disk, 2, tmp_path)
    assert "rank 1 cannot load the checkpoint" in first
    assert "cannot be brought to the ranks that need them" in second
    assert "File too large" in second
    assert not (tmp_path / "disk1").exists()
