"""An output folder with checkpoints of two runs: the buffer that is loaded is that of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import TrainerCallback

from rehearsal_plugin import RehearsalCallback
from rehearsal_plugin.errors import CheckpointError
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import Rows, number_of, trainer

SECTION: dict[str, Any] = {"buffer": {"capacity": 200}, "representatives": 2, "exchange": {"timeout_s": 20}}
FIRST, SECOND = 0, 1000


class AtBegin(TrainerCallback):
    """Notes the step and the rows that a job begins with."""

    def __init__(self, rehearsal: RehearsalCallback) -> None:
        self._rehearsal = rehearsal
        self.steps, self.rows = 0, set[int]()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        rehearsal = self._rehearsal.rehearsal
        assert rehearsal is not None
        self.steps = rehearsal.steps
        if rehearsal.buffer is not None:
            self.rows = {number_of(ids) for ids in rehearsal.buffer.sample(1000)["input_ids"]}


def train(
    folder: Path,
    first: int,
    steps: int,
    every: int,
    resume: bool | str | None = None,
    rehearsal: RehearsalCallback | None = None,
    **keys: Any,
) -> AtBegin:
    """A run whose rows begin at `first`, and which saves every so many steps."""
    callback = rehearsal or RehearsalCallback({**SECTION, **keys})
    begin = AtBegin(callback)
    saving: dict[str, Any] = {"max_steps": steps, "save_strategy": "steps", "save_steps": every}
    job, _ = trainer(folder, callbacks=[callback, begin], data=Rows(400, first), **saving)
    job.train(resume_from_checkpoint=resume)
    if rehearsal is None:
        callback.close()
    return begin


def of_run(begin: AtBegin, first: int, steps: int) -> bool:
    """Whether the job began with the rows of a run, and with those of all its steps."""
    rows = {number - first for number in begin.rows}
    return begin.steps == steps and len(rows) == 4 * steps and all(0 <= row < 400 for row in rows)


@pytest.mark.parametrize("checkpoint", [{}, {"asynchronous": True, "incremental": True}])
def test_the_checkpoint_with_the_highest_step_is_of_the_first_run(tmp_path: Path, checkpoint: dict[str, bool]) -> None:
    train(tmp_path, FIRST, 10, 5, checkpoint=checkpoint)
    train(tmp_path, SECOND, 5, 5, checkpoint=checkpoint)  # over checkpoint-5; checkpoint-10 stays
    assert of_run(train(tmp_path, FIRST, 10, 5, True), FIRST, 10)
    assert of_run(train(tmp_path, SECOND, 5, 5, str(tmp_path / "checkpoint-5")), SECOND, 5)


def test_checkpoints_of_two_runs_between_each_other(tmp_path: Path) -> None:
    train(tmp_path, FIRST, 12, 6)
    train(tmp_path, SECOND, 8, 4)
    for step, first in ((4, SECOND), (6, FIRST), (8, SECOND), (12, FIRST)):
        assert of_run(train(tmp_path / "again", first, step, 50, str(tmp_path / f"checkpoint-{step}")), first, step)


def test_a_run_of_one_rank_over_one_of_two(tmp_path: Path) -> None:
    run_ranks(train_on_ranks, 2, tmp_path)
    train(tmp_path, SECOND, 5, 5)
    assert of_run(train(tmp_path, SECOND, 5, 50, str(tmp_path / "checkpoint-5")), SECOND, 5)
    begin = train(tmp_path, FIRST, 10, 50, True)
    assert begin.steps == 10
    assert all(row < 400 for row in begin.rows)


def train_on_ranks(folder: Path) -> None:
    train(folder, FIRST, 10, 5)
    dist.barrier()


def test_a_buffer_that_is_older_than_its_trainer(tmp_path: Path) -> None:
    rehearsal = RehearsalCallback(SECTION)  # serves two trainers, so its steps are not those of the second
    train(tmp_path, FIRST, 5, 5, rehearsal=rehearsal)
    train(tmp_path, FIRST + 100, 5, 5, rehearsal=rehearsal)
    rehearsal.close()
    begin = train(tmp_path / "again", FIRST, 5, 50, str(tmp_path / "checkpoint-5"))
    assert begin.steps == 10
    assert len(begin.rows) == 40
    train(tmp_path, SECOND, 5, 5)  # at a lower step of the buffer, in the same folder
    assert of_run(train(tmp_path / "again", SECOND, 5, 50, str(tmp_path / "checkpoint-5")), SECOND, 5)


def test_a_model_whose_buffer_was_lost_gets_no_other(tmp_path: Path) -> None:
    train(tmp_path, FIRST, 5, 5)
    (file,) = (tmp_path / "checkpoint-5").glob("rehearsal-*.safetensors")
    kept = file.rename(tmp_path / "kept")
    train(tmp_path, SECOND, 5, 5)
    kept.rename(file)  # the other run's file under the name of this one's
    with pytest.raises(CheckpointError, match="rehearsal files of another run"):
        train(tmp_path, SECOND, 5, 5, True)


def test_a_buffer_follows_its_model_back(tmp_path: Path) -> None:
    train(tmp_path, FIRST, 12, 4)
    train(tmp_path, SECOND, 8, 4, str(tmp_path / "checkpoint-4"))  # back, and over checkpoint-8
    assert of_run(train(tmp_path / "again", FIRST, 12, 50, str(tmp_path / "checkpoint-12")), FIRST, 12)
    begin = train(tmp_path / "again", SECOND, 8, 50, str(tmp_path / "checkpoint-8"))
    assert begin.steps == 8
    assert [sum(row < 400 for row in begin.rows), sum(row >= SECOND for row in begin.rows)] == [16, 16]
