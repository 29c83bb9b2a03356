"""Ranks of Horovod hear at once of one that failed before it began."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from rehearsal_plugin.distributed.transport.horovod_start import StartWords
from rehearsal_plugin.errors import ConfigError, ExchangeError
from tests.helpers.horovod_ranks import run_horovod

SECTION: dict[str, Any] = {"buffer": {"capacity": 50}, "ratio": 0.25, "exchange": {"timeout_s": 60}}


class Gathered:
    """Two ranks, of which the other one's word comes after a while."""

    def __init__(self, word: str, size: int = 2) -> None:
        self._word, self.come = word, False
        self.size = lambda: size

    def allgather_async(self, sent: torch.Tensor, name: str, process_set: Any) -> int:
        self.sent = sent.tolist()
        return 7

    def poll(self, handle: int) -> bool:
        return self.come

    def synchronize(self, handle: int) -> torch.Tensor:
        return torch.tensor([*self.sent, *f"{self._word}\n".encode()], dtype=torch.uint8)


def words(hvd: Gathered) -> StartWords:
    return StartWords(hvd, None, "rehearsal.0")


def test_nothing_is_looked_at_once_all_ranks_are_here() -> None:
    hvd = Gathered("")
    start = words(hvd)
    start.check()
    assert (start.ended(), start.heard) == (False, False)
    hvd.come = True
    start.check()
    assert start.heard


def test_a_rank_that_failed_is_named_every_time() -> None:
    hvd = Gathered("rank 1 failed before its first exchange with ConfigError: x")
    start = words(hvd)
    hvd.come = True
    for _ in range(2):
        with pytest.raises(ExchangeError, match=r"^rank 1 failed before .* ConfigError: x; see its log$"):
            start.check()
        assert not start.heard


def test_a_rank_alone_and_an_elastic_job_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words(Gathered("", size=1)).heard
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    assert words(Gathered("")).heard


def one_fails() -> str:
    import horovod.torch as hvd

    from rehearsal_plugin import attach

    model = torch.nn.Linear(3, 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    start, said = time.monotonic(), ""
    try:
        handle = attach(optimizer, model=model, config={**SECTION, "ratio": 7 if hvd.rank() == 1 else 0.25})
        handle.rehearsal.update(torch.zeros(8, 3))  # type: ignore[union-attr]
        handle.rehearsal.update(torch.zeros(8, 3))  # type: ignore[union-attr]
    except (ConfigError, ExchangeError) as error:
        said = f"{time.monotonic() - start < 20} {type(error).__name__}: {error}"
    if hvd.rank() == 0:
        handle.rehearsal.close(drain_s=0.0)  # type: ignore[union-attr]
    hvd.barrier()
    again = attach(optimizer, model=model, config=SECTION)  # the next one, right on all ranks, begins as ever
    for _ in range(5):
        rows = again.rehearsal.update(torch.zeros(8, 3))  # type: ignore[union-attr]
    again.close()
    return f"{said} | {len(rows) > 8}"


@pytest.mark.horovod
def test_a_rank_that_fails_before_the_first_exchange_is_heard_at_once() -> None:
    pytest.importorskip("horovod.torch")
    other, failed = run_horovod(one_fails, 2, timeout_s=120)
    assert failed.startswith("True ConfigError: rehearsal.ratio must be less than 1")
    assert failed.endswith("| True")
    assert "rank 1 failed before its first exchange with ConfigError: rehearsal.ratio must be less than 1" in other
    assert other.startswith("True ExchangeError")
    assert other.endswith("| True")
