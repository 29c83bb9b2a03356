"""Ranks whose exchange failed find out which others say nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from rehearsal_plugin.distributed.transport import late_ranks
from rehearsal_plugin.distributed.transport.late_ranks import describe_silent
from tests.helpers.ranks import run_ranks


def look(speaking: Sequence[int]) -> str | None:
    """What a rank finds out where only some have failed; None for the others."""
    late_ranks.PATIENCE_S = 1.0
    rank = dist.get_rank()
    dist.barrier()
    found = describe_silent(range(3), rank, 7) if rank in speaking else None
    dist.barrier()
    return found


@pytest.mark.parametrize(
    ("speaking", "words"),
    [([0, 1], "no answer from rank 2"), ([0, 1, 2], ""), ([1], "no answer from ranks 0, 2")],
)
def test_those_without_a_word_are_silent(speaking: list[int], words: str) -> None:
    found = run_ranks(look, 3, speaking)
    assert [found[rank] for rank in speaking] == [words] * len(speaking)


def test_another_kind_of_store_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_ranks, "_get_default_store", HashStore)
    assert describe_silent([0, 1], 0, 3) is None


def test_a_store_that_is_gone_is_said_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("127.0.0.1", 0, 1, True)
    client = PrefixStore("job", TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False))
    monkeypatch.setattr(late_ranks, "_get_default_store", lambda: client)
    monkeypatch.setattr(late_ranks, "PATIENCE_S", 0.1)
    monkeypatch.setattr(late_ranks, "CONNECT_S", 1.0)
    assert describe_silent([0], 0, 3) == ""
    del server
    begin = time.monotonic()
    said = describe_silent([0], 0, 3)
    assert said is not None
    assert said.startswith("no answer from the store of the job at 127.0.0.1:")
    assert time.monotonic() - begin < 10
