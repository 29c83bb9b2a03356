"""A rank that is gone while the others wait in a collective of the framework: the background says who and why."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import late_ranks
from rehearsal_plugin.errors import ExchangeError
from rehearsal_plugin.runtime import failure_watch
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import new_batch

pytestmark = pytest.mark.fault

FROZEN_AT, STEPS, WORDS = 6, 12, 2


class Waker(logging.Handler):
    """Keeps what the watch says, and lets the frozen rank go on after so many words."""

    def __init__(self, frozen: int) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._frozen = frozen

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if len(self.lines) == WORDS:
            os.kill(self._frozen, signal.SIGCONT)


def train_with_a_frozen_rank(on_failure: str) -> dict[str, Any]:
    """Rank 1 stands still, as behind a dead link, while rank 0 waits for its gradients."""
    failure_watch.FIRST_S, failure_watch.EVERY_S, late_ranks.PATIENCE_S = 0.5, 1.0, 1.0
    rank, pids = dist.get_rank(), [None, None]
    dist.all_gather_object(pids, os.getpid())
    waker = Waker(pids[1] or 0)
    failure_watch.LOG.addHandler(waker if rank == 0 else logging.NullHandler())
    model = DistributedDataParallel(torch.nn.Linear(3, 1))
    exchange = {"timeout_s": 2.0, "on_failure": on_failure}
    error = ""
    with Rehearsal({"buffer": {"capacity": 64}, "representatives": 6, "exchange": exchange}) as rehearsal:
        for step in range(STEPS):
            if rank == 1 and step == FROZEN_AT:
                rehearsal.drain()  # so that the exchange before is over on both
                os.kill(os.getpid(), signal.SIGSTOP)
            batch = new_batch(rank, step, 8)
            try:
                batch = batch if error else rehearsal.update(batch)
            except ExchangeError as failure:
                error = str(failure)
            model((batch["x"] % 97).float()).mean().backward()
        return {"lines": waker.lines, "error": error, "failures": rehearsal.metrics()["failures"]}


@pytest.mark.parametrize("on_failure", ["raise", "local"])
def test_the_background_names_rank_peer_step_and_cause_until_the_training_thread_is_back(on_failure: str) -> None:
    first, _ = run_ranks(train_with_a_frozen_rank, 2, on_failure, timeout_s=60)
    for line in first["lines"]:
        assert f"exchange of step {FROZEN_AT}" in line
        assert "no answer from rank 1" in line
    failures = [line for line in first["lines"] if f"rank 0: the exchange of step {FROZEN_AT} failed" in line]
    assert failures
    assert all("did not end in time" in line for line in failures)
    assert len(first["lines"]) >= WORDS
    assert ("did not end in time" in first["error"]) == (on_failure == "raise")
    assert first["failures"] == (on_failure == "local")
