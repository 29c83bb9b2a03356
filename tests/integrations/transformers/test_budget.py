"""A forgetting budget under a Trainer: ratio and weight are in its log, and go on where a checkpoint left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rehearsal_plugin import RehearsalCallback
from tests.helpers.trainer_jobs import Rows, trainer

SECTION: dict[str, Any] = {
    "buffer": {"capacity": 200, "partition_by": "domain"},
    "hidden": ["domain"],
    "ratio": {"budget": 0.01, "min": 0.1, "max": 0.6, "window": 8, "by": "both", "max_weight": 2.0},
    "losses_every": 1,
}
STEPS = 40


def entries(folder: Path, section: dict[str, Any], resume: bool = False, **arguments: Any) -> list[dict[str, Any]]:
    """What a job logs of ratio, weight and forgetting, step by step."""
    callback = RehearsalCallback(section)
    keys: dict[str, Any] = {"remove_unused_columns": False, "logging_steps": 1, "max_steps": STEPS, **arguments}
    job, _ = trainer(folder, callbacks=[callback], data=Rows(domain=True), **keys)
    job.train(resume_from_checkpoint=resume)
    callback.close()
    names = ("rehearsal/ratio", "rehearsal/loss_weight", "rehearsal/forgetting/", "loss")
    return [
        {name: value for name, value in entry.items() if name.startswith(names)}
        for entry in job.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize("by", ["ratio", "loss_weight", "both"])
def test_ratio_and_weight_are_in_the_log(by: str, tmp_path: Path) -> None:
    ratio = {key: value for key, value in SECTION["ratio"].items() if by != "ratio" or key != "max_weight"}
    log = entries(tmp_path, {**SECTION, "ratio": {**ratio, "by": by}})
    ratios = {entry["rehearsal/ratio"] for entry in log[3:]}
    weights = {entry["rehearsal/loss_weight"] for entry in log[3:]}
    assert all(0.1 <= one <= 0.6 for one in ratios)
    assert all(1 <= one <= 2 for one in weights)
    assert (len(ratios) > 1) == (by != "loss_weight")
    assert weights == {"ratio": {1.0}, "both": {2.0}}.get(by, weights), "both: the weight is at its highest first"
    assert len(weights) > 1 or by != "loss_weight"
    assert any(name.startswith("rehearsal/forgetting/") for name in log[-1])


def test_a_resumed_job_has_the_ratio_and_the_loss_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    straight = entries(tmp_path, SECTION, save_strategy="steps", save_steps=STEPS // 2)
    (tmp_path / f"checkpoint-{STEPS}").rename(tmp_path / "last")
    assert entries(tmp_path, SECTION, resume=True) == straight
