"""Passes without a step: few candidates are held, and they stand for all that were offered."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.runtime import candidate_staging
from rehearsal_plugin.runtime.candidate_staging import CandidateStaging
from rehearsal_plugin.runtime.coordinator import MANY_WITHOUT_STEP, MOST_WITHOUT_STEP
from tests.helpers.chance import SIGNIFICANCE, equally_likely

LAYOUT = RowLayout.infer({"id": torch.zeros(2, dtype=torch.int64)})
HELD = 20


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most `HELD` rows are held."""
    monkeypatch.setattr(candidate_staging, "STAGED_BYTES", HELD * LAYOUT.row_bytes)


def staging(seed: int = 0, policy: str = "reservoir") -> CandidateStaging:
    config = RehearsalConfig.load({"seed": seed, "buffer": {"policy": policy}})
    return CandidateStaging(config, 0, 4, LAYOUT, torch.device("cpu"))


def stage(staged: CandidateStaging, first: int, count: int) -> int:
    return staged.stage([torch.arange(first, first + count)], LAYOUT, 0)


def ids(staged: CandidateStaging) -> list[int]:
    return list(LAYOUT.views(staged.staged().rows)["id"].tolist())


@pytest.mark.usefixtures("few")
def test_no_more_rows_are_held_than_there_is_room_for() -> None:
    staged = staging()
    for number in range(50):
        stage(staged, 7 * number, 7)
        assert len(ids(staged)) == min(HELD, 7 * number + 7)
        assert len(set(ids(staged))) == len(ids(staged))
    assert staged.offered == 350
    staged.flush()
    assert (staged.offered, ids(staged)) == (0, [])


@pytest.mark.usefixtures("few")
def test_rows_up_to_the_bound_are_held_as_they_came() -> None:
    staged = staging()
    for number in range(4):
        stage(staged, 5 * number, 5)
    assert ids(staged) == list(range(HELD))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("sizes", [[30], [7] * 6, [20, 1, 1, 18], [1] * 40])
def test_all_that_were_offered_are_equally_likely_to_be_held(sizes: list[int]) -> None:
    held: list[int] = []
    for seed in range(400):
        staged, first = staging(seed), 0
        for size in sizes:
            stage(staged, first, size)
            first += size
        held += ids(staged)
    assert equally_likely(held, sum(sizes)) > SIGNIFICANCE


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dropped", [0, 1, 3])
def test_a_micro_batch_is_taken_back_whether_rows_were_thinned_or_not(dropped: int) -> None:
    for count in (3, 12):
        staged = staging()
        for number in range(count):
            stage(staged, 6 * number, 6)
        if dropped < count:
            staged.withdraw(dropped)
            staged.withdraw(dropped)
            assert not set(ids(staged)) & set(range(6 * dropped, 6 * dropped + 6))
            assert staged.offered == 6 * (count - 1)
        stage(staged, 1000, 6)
        assert len(ids(staged)) <= HELD


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("sizes", [[30], [7] * 6, [20, 1, 1, 18], [1] * 45, [3, 50, 3], [19, 20, 40]])
def test_fifo_holds_the_newest_in_their_order(sizes: list[int]) -> None:
    staged, first = staging(policy="fifo"), 0
    for number, size in enumerate(sizes):
        stage(staged, first, size)
        first += size
        if number % 2:
            assert ids(staged) == list(range(max(0, first - HELD), first))
    assert staged.offered == first
    assert LAYOUT.views(staged.flush().rows)["id"].tolist() == list(range(max(0, first - HELD), first))
    stage(staged, 0, 5)
    assert ids(staged) == list(range(5))


@pytest.mark.usefixtures("few")
def test_fifo_goes_on_in_order_after_rows_were_taken_back() -> None:
    staged = staging(policy="fifo")
    numbers = [stage(staged, 6 * part, 6) for part in range(6)]
    staged.withdraw(numbers[4])
    assert ids(staged) == [*range(16, 24), *range(30, 36)]
    stage(staged, 100, 8)
    assert ids(staged) == [*range(18, 24), *range(30, 36), *range(100, 108)]


@pytest.mark.parametrize("held", [12, 20])
@pytest.mark.parametrize("partition_by", [None, "y"])
def test_a_fifo_buffer_holds_the_newest_rows_whatever_the_steps(
    held: int, partition_by: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate_staging, "STAGED_BYTES", held * 32)
    buffer = {"capacity": 12, "policy": "fifo", "partition_by": partition_by}
    newest = 0
    with Rehearsal({"buffer": buffer, "ratio": 0.2}) as rehearsal:
        for micro_batches in (5, 1, 3, 1, 1, 7):
            for _ in range(micro_batches):
                rehearsal.augment({"id": newest + torch.arange(5), "y": torch.arange(5) % 2})
                newest += 5
            rehearsal.step()
            if newest < 12:
                continue
            rows = rehearsal.buffer.sample(12)["id"].tolist()  # type: ignore[union-attr]
            assert sorted(rows) == list(range(newest - 12, newest))


@pytest.mark.parametrize("policy", ["reservoir", "fifo", "random_replace", "balanced", "score", "herding"])
@pytest.mark.usefixtures("few")
def test_all_that_were_offered_count(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidate_staging, "STAGED_BYTES", 1)
    buffer: dict[str, Any] = {"capacity": 12, "policy": policy, "partition_by": "y"}
    if policy in ("score", "herding"):
        buffer["score_by"] = "score"
    with Rehearsal({"buffer": buffer, "ratio": 0.2}) as rehearsal:
        for step in range(6):
            for micro in range(5):
                numbers = torch.arange(9) + 9 * (5 * step + micro)
                rehearsal.augment({"id": numbers, "y": numbers % 3, "score": torch.rand(9, 1)})
            rehearsal.step()
        rows = rehearsal.buffer.sample(100)  # type: ignore[union-attr]
        metrics = rehearsal.metrics()
    assert metrics["rows_offered"] == 270
    assert sum(metrics[f"rows_offered/{key}"] for key in range(3)) == 270
    assert len(set(rows["id"].tolist())) == metrics["rows_stored"] == 12
    assert torch.equal(rows["y"], rows["id"] % 3)


def test_a_reservoir_is_uniform_over_steps_of_very_unequal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidate_staging, "STAGED_BYTES", 1)
    stored: list[int] = []
    for seed in range(500):
        with Rehearsal({"buffer": {"capacity": 6}, "ratio": 0.0, "seed": seed}) as rehearsal:
            first = 0
            for sizes in ((4,), (8, 8, 8), (3,), (9, 4)):
                for size in sizes:
                    rehearsal.augment(torch.arange(first, first + size))
                    first += size
                rehearsal.step()
            stored += rehearsal.buffer.sample(6).tolist()  # type: ignore[union-attr]
    assert equally_likely(stored, 44) > SIGNIFICANCE


def test_a_checkpoint_between_passes_keeps_what_was_offered(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidate_staging, "STAGED_BYTES", 1)
    section = {"buffer": {"capacity": 12}, "ratio": 0.2}
    with Rehearsal(section) as first, Rehearsal(section) as second:
        for _ in range(3):
            first.augment(torch.arange(9))
            first.step()
        for _ in range(5):
            first.augment(torch.arange(9))
        first.save(tmp_path)
        second.load(tmp_path)
        for rehearsal in (first, second):
            rehearsal.augment(torch.arange(9))
            rehearsal.step()
            assert rehearsal.metrics()["rows_offered"] == 81
        assert np.array_equal(first.buffer.sample(12), second.buffer.sample(12))  # type: ignore[union-attr]


def test_a_forgotten_step_is_said_and_then_refused(caplog: pytest.LogCaptureFixture) -> None:
    with Rehearsal({"buffer": {"capacity": 10}}) as rehearsal, caplog.at_level(logging.WARNING):
        for _ in range(MOST_WITHOUT_STEP):
            rehearsal.augment(torch.zeros(1))
        assert [str(MANY_WITHOUT_STEP) in record.message for record in caplog.records] == [True]
        with pytest.raises(BatchError, match=r"and none of step\(\).*call rehearsal.step\(\) once an optimizer step"):
            rehearsal.augment(torch.zeros(1))
        rehearsal.step()
        rehearsal.augment(torch.zeros(1))


def test_many_passes_after_a_step_are_no_error() -> None:
    with Rehearsal({"buffer": {"capacity": 10}}) as rehearsal:
        rehearsal.augment(torch.zeros(1))
        rehearsal.step()
        for _ in range(MOST_WITHOUT_STEP + 1):
            rehearsal.augment(torch.zeros(1))
        rehearsal.step()
