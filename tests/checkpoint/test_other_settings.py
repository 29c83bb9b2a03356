"""A job that loads a checkpoint of other settings: what it says, what it counts, and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.runtime.forgetting_meter import ForgettingMeter


def job(**buffer: Any) -> Rehearsal:
    return Rehearsal({"buffer": {"capacity": 200, **buffer}, "ratio": 0.25}, LocalTransport())


def train(rehearsal: Rehearsal, steps: int = 10) -> None:
    for _ in range(steps):
        rehearsal.update({"x": torch.zeros(8, 2), "domain": torch.arange(8) % 2, "other": torch.arange(8) % 4})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with job() as rehearsal:
        train(rehearsal)
        rehearsal.save(tmp_path)
    return tmp_path


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_a_load_says_how_the_job_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rehearsal_plugin")
    with job() as rehearsal:
        rehearsal.load(folder)
        assert rehearsal.metrics()["rows_stored"] == 80
    assert f"loaded {folder} at step 10, with 80 rows on rank 0; replay goes on bit for bit" in said(caplog)
    caplog.clear()
    with job(capacity=50) as rehearsal:
        rehearsal.load(folder)
        assert rehearsal.metrics()["rows_stored"] == 50
    assert "rank 0 keeps 50 of its share of 80 rows, as its buffer has no room for more" in said(caplog)
    assert "with 50 rows on rank 0; rows were shared out anew, and totals begin at 0" in said(caplog)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"partition": 0}, {"partition": 1}),
        ({"partition_by": "domain"}, {"partition_by": "other"}),
        ({}, {"partition_by": "domain"}),
        ({"partition_by": "domain"}, {}),
    ],
)
def test_rows_go_on_under_another_partition(before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    with job(**before) as rehearsal:
        train(rehearsal)
        rehearsal.save(tmp_path)
    with job(**after) as rehearsal:
        rehearsal.load(tmp_path)
        train(rehearsal)
        assert rehearsal.metrics()["rows_stored"] == 160


@pytest.mark.parametrize("before", [{}, {"partition_by": "domain"}])
def test_rows_without_the_partition_of_a_job_are_refused(before: dict[str, Any], tmp_path: Path) -> None:
    with job(**before) as rehearsal:
        train(rehearsal)
        rehearsal.save(tmp_path)
    words = (
        r"rows of a job without rehearsal.buffer.partition.*leave the key out, or remove the checkpoint's rehearsal-"
    )
    with job(partition=3) as rehearsal, pytest.raises(CheckpointError, match=words):
        rehearsal.load(tmp_path)


def test_levels_of_an_earlier_release_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {
        "buffer": {"capacity": 200, "partition_by": "domain"},
        "ratio": 0.25,
        "losses_every": 1,
        "sampling": {"weights": "forgetting"},
    }
    now = ForgettingMeter.state_dict

    def before(meter: ForgettingMeter) -> dict[str, Any]:
        state = now(meter)
        return {**state, "levels": [level[:-1] for level in state["levels"]]}

    with Rehearsal(section, LocalTransport()) as rehearsal:
        for _ in range(80):
            batch = rehearsal.augment({"x": torch.rand(8, 1), "domain": torch.arange(8) % 2})
            rehearsal.loss(mse_loss, batch["x"], 0 * batch["x"])
            rehearsal.step()
        told = {name: value for name, value in rehearsal.metrics().items() if name.startswith("forgetting/")}
        monkeypatch.setattr(ForgettingMeter, "state_dict", before)
        rehearsal.save(tmp_path)
    monkeypatch.undo()
    with Rehearsal(section, LocalTransport()) as rehearsal:
        rehearsal.load(tmp_path)
        assert told.keys() == {"forgetting/0", "forgetting/1"}
        assert {name: rehearsal.metrics()[name] for name in told} == told


@pytest.mark.parametrize("after", [{}, {"partition_by": "domain"}])
def test_rows_with_one_are_refused_by_a_job_without(after: dict[str, Any], tmp_path: Path) -> None:
    with job(partition=3) as rehearsal:
        train(rehearsal)
        rehearsal.save(tmp_path)
    with job(**after) as rehearsal:
        rehearsal.load(tmp_path)
        with pytest.raises(CheckpointError, match=r"holds rows of .*, and the batch has .*remove the checkpoint's"):
            train(rehearsal)
