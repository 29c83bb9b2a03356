"""Ranks whose exchange failed find out which others say nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from rehearsal_plugin.distributed.transport import late_ranks
from rehearsal_plugin.distributed.transport.late_ranks import silent_ranks
from tests.helpers.ranks import free_port, run_ranks


def look(speaking: Sequence[int]) -> list[int] | None:
    """What a rank finds out where only some have failed; None for the others."""
    late_ranks.PATIENCE_S = 1.0
    rank = dist.get_rank()
    dist.barrier()
    found = silent_ranks(range(3), rank, 7) if rank in speaking else None
    dist.barrier()
    return found


@pytest.mark.parametrize("speaking", [[0, 1], [0, 1, 2], [1]])
def test_those_without_a_word_are_silent(speaking: list[int]) -> None:
    found = run_ranks(look, 3, speaking)
    silent = [rank for rank in range(3) if rank not in speaking]
    assert [found[rank] for rank in speaking] == [silent] * len(speaking)


def test_another_kind_of_store_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_ranks, "_get_default_store", HashStore)
    assert silent_ranks([0, 1], 0, 3) is None


def test_a_store_that_is_not_reached_cannot_tell_and_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, 1, True)
    monkeypatch.setattr(late_ranks, "_get_default_store", lambda: PrefixStore("job", store))
    monkeypatch.setattr(late_ranks, "PATIENCE_S", 0.1)
    monkeypatch.setattr(late_ranks, "CONNECT_S", 1.0)
    assert silent_ranks([0], 0, 3) == []
    gone = free_port()
    connect = partial(TCPStore, "127.0.0.1", gone, None, False, timedelta(seconds=1), wait_for_workers=False)
    monkeypatch.setattr(late_ranks, "_own_connection", connect)
    begin = time.monotonic()
    assert silent_ranks([0], 0, 3) is None
    assert time.monotonic() - begin < 10
