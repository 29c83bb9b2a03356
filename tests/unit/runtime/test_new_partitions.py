"""Ever new partitions: a step works on those that changed, not on all that there are. Counted, not timed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.distributed.global_counts import GlobalCounts

BATCH, STEPS = 8, 10
FEW, MANY = 60, 800  # steps before it is counted, with as many times BATCH partitions

JOBS: dict[str, dict[str, Any]] = {
    "drawn by row": {},
    "drawn by partition": {"sampling": {"weights": "balanced"}},
    "weights": {"sampling": {"weights": {"0": 1.0, "1": 2.0}}},
    "balanced": {"buffer": {"policy": "balanced"}},
}


class Work:
    """Lines of the package that are run, calls it makes of compiled functions, and pairs of a key and rows it sends."""

    def __init__(self) -> None:
        self.lines = self.calls = self.pairs = 0

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if "rehearsal_plugin" not in frame.f_code.co_filename:
            return None
        self.lines += event == "line"
        return self.trace

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        self.calls += event == "c_call" and "rehearsal_plugin" in frame.f_code.co_filename


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    counted, changes = Work(), GlobalCounts.changes

    def changes_counted(self: GlobalCounts, *args: Any) -> Any:
        result = changes(self, *args)
        counted.pairs += len(result[1])
        return result

    monkeypatch.setattr(GlobalCounts, "changes", changes_counted)
    setters: list[tuple[Callable[[Any], Any], Any]] = [
        (threading.settrace, counted.trace),
        (sys.settrace, counted.trace),
        (threading.setprofile, counted.profile),
        (sys.setprofile, counted.profile),
    ]
    before = sys.gettrace(), sys.getprofile()
    for setter, value in setters:
        setter(value)
    yield counted
    for setter, value in zip((item[0] for item in setters), (None, before[0], None, before[1]), strict=True):
        setter(value)


def count(work: Work, rehearsal: Rehearsal, first: int, until: int) -> tuple[float, float, float]:
    """Lines, calls and pairs a step, of ten steps after `until`."""
    for step in range(first, until + STEPS):
        if step == until:
            rehearsal._coordinator.drain()
            work.lines = work.calls = work.pairs = 0
        rehearsal.update({"x": torch.zeros(BATCH, 4), "label": torch.arange(BATCH) + BATCH * step})
    rehearsal._coordinator.drain()
    return work.lines / STEPS, work.calls / STEPS, work.pairs / STEPS


@pytest.mark.parametrize("name", JOBS)
def test_a_step_does_no_more_when_there_are_ten_times_as_many_partitions(name: str, work: Work) -> None:
    section = {"representatives": 2, **JOBS[name]}
    section["buffer"] = {"capacity": 200, "partition_by": "label", **section.get("buffer", {})}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        few = count(work, rehearsal, 0, FEW)
        many = count(work, rehearsal, FEW + STEPS, MANY)
    assert few[0] > 100, "nothing was counted"
    for before, after in zip(few, many, strict=True):
        assert after <= 1.1 * before + 2
    assert many[2] <= 2 * BATCH + 1, "each row that comes, and each that it replaces, has a partition"
