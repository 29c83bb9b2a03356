"""The two lines about a job: what a row is, and what came of it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.errors import BatchError
from tests.helpers.samples import new_batch

SECTION: dict[str, Any] = {"buffer": {"capacity": 50}, "representatives": 3}


def run(steps: int, caplog: pytest.LogCaptureFixture, batch: Any = None, **keys: Any) -> list[tuple[int, str]]:
    """Level and text of the lines that a job logs."""
    caplog.set_level(logging.INFO, logger="rehearsal_plugin")
    with Rehearsal({**SECTION, **keys}, LocalTransport()) as rehearsal:
        for step in range(steps):
            rehearsal.update(new_batch(0, step, 6) if batch is None else batch)
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_the_first_batch_says_what_a_row_is_and_what_passes_through(caplog: pytest.LogCaptureFixture) -> None:
    batch = {"x": torch.zeros(6, 3), "y": torch.zeros(6, dtype=torch.int64), "epoch": 2, "table": torch.zeros(9)}
    (level, line), *others = run(6, caplog, batch)
    assert level == logging.INFO
    assert "a row is x float32 [3], y int64 []; 32 bytes a row, 50 rows fit" in line
    assert "passing through unreplayed: epoch (no entries), table (9 entries, not 6)" in line
    assert "replayed rows join in update() or augment()" in line
    assert len(others) == 1, "one line at the begin, one at the end"


def test_the_end_says_what_was_offered_stored_and_replayed(caplog: pytest.LogCaptureFixture) -> None:
    level, line = run(10, caplog)[-1]
    assert level == logging.INFO
    assert "rank 0: 60 rows offered, 50 stored, 24 replayed; the share of replayed rows was 0.2857" in line


@pytest.mark.parametrize(
    ("steps", "keys", "reason"),
    [
        (2, {}, "2 steps were made: rows come three steps after"),
        (6, {"start_step": 100}, "ended before rehearsal.start_step 100"),
        (0, {}, "no batch came"),
        (
            9,
            {"buffer": {"capacity": 50, "partition_by": "label"}, "sampling": {"weights": {"77": 1, "0": 0}}},
            "sampling.weights names the partitions [77], and this rank holds rows of [0, 1, 2",
        ),
    ],
    ids=["short", "start_step", "no batch", "mixture"],
)
def test_a_job_without_replay_is_a_warning_with_the_reason(
    steps: int, keys: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    level, line = run(steps, caplog, **keys)[-1]
    assert level == logging.WARNING
    assert reason in line


def test_a_job_that_an_error_ended_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    rehearsal = Rehearsal(SECTION, LocalTransport())
    rehearsal.augment(new_batch(0, 0, 6))
    rehearsal.__exit__(ValueError, ValueError("broken"), None)
    assert "as the job ended with ValueError" in caplog.messages[-1]
    assert "call step()" not in caplog.messages[-1]


AT_EXIT = """
import logging, torch
from rehearsal_plugin import LocalTransport, Rehearsal
logging.basicConfig(level=logging.INFO)
rehearsal = Rehearsal({"buffer": {"capacity": 50}, "representatives": 3}, LocalTransport())
rehearsal.augment({"x": torch.zeros(6, 3)})
raise ValueError("broken")
"""


def test_so_is_one_that_nobody_closed() -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "0 replayed; the share of replayed rows was 0, as the job ended with ValueError" in done.stderr


def test_a_job_that_wants_no_replay_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert run(6, caplog, representatives=0)[-1][0] == logging.INFO


def test_without_an_optimizer_step_the_reason_is_the_missing_step(caplog: pytest.LogCaptureFixture) -> None:
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        for step in range(5):
            rehearsal.augment(new_batch(0, step, 6))
    assert "no optimizer step was counted: call step()" in caplog.records[-1].getMessage()


def test_rows_of_the_jobs_before_a_checkpoint_are_not_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        for step in range(5):
            rehearsal.update(new_batch(0, step, 6))
        rehearsal.save(tmp_path)
    caplog.set_level(logging.INFO, logger="rehearsal_plugin")
    for steps, words in ((2, "12 rows offered, 42 stored, 6 replayed"), (0, "no batch came")):
        with Rehearsal(SECTION, LocalTransport()) as rehearsal:
            rehearsal.load(tmp_path)
            for step in range(steps):
                rehearsal.update(new_batch(0, step, 6))
        assert words in caplog.records[-1].getMessage()
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        rehearsal.load(tmp_path)
        rehearsal.report.rows_new = 1  # a batch whose step never came
    assert "no optimizer step was counted" in caplog.records[-1].getMessage()


def test_many_leaves_are_told_by_their_number(caplog: pytest.LogCaptureFixture) -> None:
    line = run(1, caplog, {f"f{number}": torch.zeros(4) for number in range(60)})[0][1]
    assert "f39 float32 [] and 20 more" in line


def test_a_hidden_field_that_no_batch_has_is_refused_with_the_nearest() -> None:
    rehearsal = Rehearsal({**SECTION, "hidden": ["lable"]}, LocalTransport())
    with rehearsal, pytest.raises(BatchError, match=r"rehearsal\.hidden names 'lable'.* did you mean 'label'"):
        rehearsal.update(new_batch(0, 0, 6))


def test_steps_without_a_batch_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        for fed in (True, False, False, True, *[False] * 7):
            if fed:
                rehearsal.augment(new_batch(0, 0, 6))
            rehearsal.step()
            told = [message for message in caplog.messages if "no batch came in the last 3 optimizer steps" in message]
        assert len(told) == 1
        assert "call train() on the model or engine" in told[0]


def test_batches_without_rows_are_batches(caplog: pytest.LogCaptureFixture) -> None:
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        for rows in (6, 0, 0, 0, 0):
            rehearsal.update(new_batch(0, 0, rows))
        assert not caplog.messages
