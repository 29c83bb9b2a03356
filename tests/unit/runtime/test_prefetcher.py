"""The background of one rank: staged, launched, collected, and stopped."""

from __future__ import annotations

import threading
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal_plugin import LocalTransport, RehearsalBuffer, RehearsalConfig, RowLayout
from rehearsal_plugin.core.metrics import Metrics
from rehearsal_plugin.distributed.groups import RankGroup
from rehearsal_plugin.distributed.header import Notes, Word
from rehearsal_plugin.distributed.in_flight import Arrival
from rehearsal_plugin.distributed.request import Request
from rehearsal_plugin.errors import BatchError, RehearsalError
from rehearsal_plugin.runtime.prefetcher import Prefetcher
from tests.helpers.samples import Batch, new_batch

CPU = torch.device("cpu")


class Job:
    """A prefetcher alone, and the calls of its training thread."""

    def __init__(self, **keys: Any) -> None:
        config = RehearsalConfig.load({"buffer": {"capacity": 50}, "exchange": {"timeout_s": 5}, **keys})
        self.layout, self.metrics = RowLayout.infer(new_batch(0, 0, 4)), Metrics()
        buffer = RehearsalBuffer(config.buffer, self.layout)
        self.prefetcher = Prefetcher(config, RankGroup.of_all(LocalTransport()), buffer, CPU, self.metrics, rank=0)

    def stage(self, batch: Batch) -> None:
        self.prefetcher.stage_candidates(self.layout.columns(batch))

    def step(self, number: int, request: int = 3) -> Arrival | None:
        arrival = self.prefetcher.collect()
        self.stage(new_batch(0, number, 4))
        self.prefetcher.launch(Request(request), None, Notes())
        return arrival


@pytest.fixture(params=["thread", "inline"])
def job(request: pytest.FixtureRequest) -> Any:
    made = Job(exchange={"timeout_s": 5, "launch": request.param})
    yield made
    made.prefetcher.close(drain_s=1.0)


def test_rows_come_with_the_second_job_after_the_request(job: Job) -> None:
    arrivals = [job.step(number) for number in range(5)]
    assert [None if arrival is None else len(arrival.rows) for arrival in arrivals] == [None, None, 3, 3, 3]


def test_candidates_are_stored_by_the_job(job: Job) -> None:
    for number in range(3):
        job.step(number)
    job.prefetcher.drain()
    rows = job.prefetcher.buffer.state_dict()["rows"]
    assert sorted(job.layout.views(rows)["id"].tolist()) == sorted(
        id for number in range(3) for id in new_batch(0, number, 4)["id"].tolist()
    )
    assert (job.metrics.rows_offered, job.metrics.rows_admitted, job.metrics.rows_stored) == (12, 12, 12)


def test_a_batch_may_be_changed_once_it_is_staged(job: Job) -> None:
    batch = new_batch(0, 0, 4)
    job.stage(batch)
    batch["id"].zero_()
    job.prefetcher.launch(Request(0), None, Notes())
    job.prefetcher.drain()
    stored = job.layout.views(job.prefetcher.buffer.state_dict()["rows"])["id"].tolist()
    assert stored == new_batch(0, 0, 4)["id"].tolist()


def test_notes_are_those_of_the_last_exchange(job: Job) -> None:
    job.prefetcher.launch(Request(0), None, Notes(loss_weight=7))
    job.prefetcher.collect()
    assert job.prefetcher.census.notes[0, Word.LOSS_WEIGHT - Word.MIXTURE] == 7


def test_refused_candidates_leave_no_trace() -> None:
    job = Job(non_finite="refuse")
    bad = {**new_batch(0, 0, 4), "x": torch.full_like(new_batch(0, 0, 4)["x"], float("nan"))}
    with pytest.raises(BatchError, match="NaN"):
        job.stage(bad)
    job.prefetcher.launch(Request(0), None, Notes())
    job.prefetcher.collect()
    assert job.metrics.rows_offered == 0
    job.prefetcher.close(drain_s=1.0)


def test_an_error_of_the_job_names_rank_and_step_and_comes_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.step(0)
    job.prefetcher.drain()

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(job.prefetcher.buffer, "write", fail)
    job.step(1)
    for _ in range(2):
        with pytest.raises(RehearsalError, match="background job on rank 0 at step 1 failed: OSError: the disk"):
            job.prefetcher.collect()


def test_it_goes_on_from_its_state(job: Job) -> None:
    for number in range(4):
        job.step(number)
    loaded, state = Job(), deepcopy(job.prefetcher.state_dict())  # as in a file; it waits until the rows are written
    loaded.prefetcher.buffer.load_state_dict(job.prefetcher.buffer.state_dict())
    loaded.prefetcher.load_state_dict(state)
    for number in range(4, 7):
        first, second = job.step(number), loaded.step(number)
        assert first is not None
        assert second is not None
        assert torch.equal(first.rows, second.rows)
    assert np.array_equal(job.prefetcher.buffer.counts()[1], loaded.prefetcher.buffer.counts()[1])
    loaded.prefetcher.close(drain_s=1.0)


def test_close_tells_whether_the_background_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    job, hold = Job(), threading.Event()
    write = job.prefetcher.buffer.write

    def slow(*arguments: Any) -> None:
        hold.wait(10)
        write(*arguments)

    monkeypatch.setattr(job.prefetcher.buffer, "write", slow)
    job.step(0)
    assert not job.prefetcher.close(drain_s=0.0, grace_s=0.1)
    hold.set()
    assert job.prefetcher.close(drain_s=0.0, grace_s=5.0)
