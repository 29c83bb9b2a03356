"""The file of metrics that rank 0 writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal, RehearsalConfig
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import ConfigError
from tests.helpers.seat import Seat

STEPS = 20


def train(path: Path | None, steps: int = STEPS, rank: int = 0, guard: Any = None, **metrics: Any) -> Rehearsal:
    """A job of two domains, one after the other, whose model forgets the first."""
    section = {
        "buffer": {"capacity": 100, "partition_by": "domain"},
        "ratio": 0.25,
        "losses_every": 1,
        "guard": guard,
        "sampling": {"scope": "global" if guard else "local"},
        "metrics": {"file": None if path is None else str(path), "every": 5, **metrics},
    }
    torch.manual_seed(0)
    with Rehearsal(section, LocalTransport() if guard else Seat(rank, 2)) as rehearsal:
        for step in range(steps):
            domain = torch.full((12,), 2 * step // steps)
            batch = rehearsal.augment({"x": torch.randn(12, 3), "y": domain, "domain": domain})
            # Scores that are right for the domain of the moment alone.
            scores = torch.nn.functional.one_hot(torch.full_like(batch["y"], 2 * step // steps), 2) * 3.0
            rehearsal.loss(cross_entropy, scores.requires_grad_(), batch["y"]).backward()  # type: ignore[no-untyped-call]
            rehearsal.step()
    return rehearsal


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_come_every_so_many_steps_between_a_start_and_an_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    train(path)
    start, *records, end = lines(path)
    assert (start["event"], start["step"], start["ranks"]) == ("start", 0, 2)
    assert start["section"]["partition_by"] == "domain"
    assert [record["step"] for record in records] == [0, 5, 10, 15, STEPS]
    assert (end["event"], end["step"]) == ("end", STEPS)
    assert end["time"] >= records[-1]["time"] >= start["time"]


def test_a_record_tells_what_the_job_tells(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rehearsal = train(path)
    last = lines(path)[-2]
    assert last["metrics"] == rehearsal.metrics()
    assert (last["rows_new"], last["rows_seen"]) == (rehearsal.report.rows_new, rehearsal.report.rows_replayed)
    assert last["rows_new"] == 12 * STEPS
    assert last["ratio"] == 0.25
    assert last["guard"] is None
    assert {"loss_new", "loss_replayed/0", "rows_stored/1", "waited_ms"} <= last["metrics"].keys()


def test_ages_are_those_of_the_stored_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rehearsal = train(path)
    assert rehearsal.buffer is not None
    ages = sorted(STEPS - rehearsal.buffer.written(torch.arange(len(rehearsal.buffer)).numpy()))
    last = lines(path)[-2]
    assert (last["age"][0], last["age"][4]) == (ages[0], ages[-1])
    assert last["age/0"] > last["age/1"] > 0


def test_the_guard_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(path, steps=60, guard={"window": 5, "bound": 1.2, "action": "raise_ratio"})
    records = [record for record in lines(path) if "event" not in record]
    assert records[3]["guard"]["exceeded"] is False
    assert any(record["guard"]["exceeded"] for record in records)
    assert records[-1]["ratio"] > 0.25


def test_other_ranks_and_jobs_without_the_key_write_nothing(tmp_path: Path) -> None:
    train(tmp_path / "metrics.jsonl", rank=1)
    train(None)
    assert not list(tmp_path.iterdir())


def test_a_job_that_goes_on_adds_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(path)
    train(path)
    assert [line["event"] for line in lines(path) if "event" in line] == ["start", "end"] * 2


def test_the_file_is_begun_anew_before_it_grows_without_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(path, steps=200, every=1, rotate="20kB")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.jsonl.1"]
    earlier, now = lines(tmp_path / "metrics.jsonl.1"), lines(path)
    assert 20_000 <= (tmp_path / "metrics.jsonl.1").stat().st_size < 22_000
    assert earlier[-1]["step"] + 1 == now[0]["step"]


def test_a_file_that_cannot_be_written_ends_no_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "file" / "metrics.jsonl")
    assert [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()] == [
        f"rehearsal.metrics.file {tmp_path}/file/metrics.jsonl cannot be written: [Errno 17] File exists: "
        f"'{tmp_path}/file'; no more metrics are written, and the job goes on"
    ]


@pytest.mark.parametrize("metrics", [{"every": 0}, {"rotate": "much"}, {"file": ""}])
def test_wrong_values_are_refused(metrics: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"rehearsal\.metrics\.{next(iter(metrics))}"):
        RehearsalConfig.load({"metrics": metrics})
