"""Trainers that generate what they train on are refused by name; those of TRL are known by their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import Trainer

from rehearsal_plugin import RehearsalCallback, RehearsalConfig
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.transformers import callback as callbacks
from tests.helpers.trainer_jobs import trainer

SECTION: dict[str, Any] = {"buffer": {"capacity": 50}, "representatives": 2}


def kind_of(name: str, module: str = "trl.trainer.grpo_trainer", base: type = Trainer, **members: Any) -> Any:
    """A trainer whose class has the full name of another one's."""
    return type(name, (base,), {"__module__": module, **members})


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("GRPOTrainer", "trl.trainer.grpo_trainer"),
        ("RLOOTrainer", "trl.trainer.rloo_trainer"),
        ("PPOTrainer", "trl.experimental.ppo.ppo_trainer"),
        ("OnlineDPOTrainer", "trl.experimental.online_dpo.online_dpo_trainer"),
        ("GKDTrainer", "trl.experimental.gkd.gkd_trainer"),
    ],
)
def test_they_are_refused_before_the_first_step(tmp_path: Path, name: str, module: str) -> None:
    job, recorder = trainer(tmp_path, callbacks=[RehearsalCallback(SECTION)], kind=kind_of(name, module))
    with pytest.raises(ConfigError, match=f"{name} trains on text that it generates.* SFTTrainer"):
        job.train()
    assert not recorder.batches


def test_a_subclass_is_named_with_the_class_that_generates(tmp_path: Path) -> None:
    mine = kind_of("Mine", "mine", kind_of("GRPOTrainer"))
    job, _ = trainer(tmp_path, callbacks=[RehearsalCallback(SECTION)], kind=mine)
    with pytest.raises(ConfigError, match=r"Mine \(a GRPOTrainer\) trains on text that it generates"):
        job.train()


def test_an_unchanged_script_is_refused_where_it_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "__init__", Trainer.__init__)
    callbacks.patch(RehearsalConfig.load(SECTION))
    with pytest.raises(ConfigError, match="GRPOTrainer trains on text that it generates"):
        trainer(tmp_path, kind=kind_of("GRPOTrainer"))


@pytest.mark.parametrize(
    ("name", "module", "section"),
    [
        ("GRPOTrainer", "mine", SECTION),
        ("SFTTrainer", "trl.trainer.sft_trainer", SECTION),
        ("GRPOTrainer", "trl.trainer.grpo_trainer", {**SECTION, "enabled": False}),
    ],
    ids=["of another library", "that does not generate", "without rehearsal"],
)
def test_others_train(tmp_path: Path, name: str, module: str, section: dict[str, Any]) -> None:
    job, recorder = trainer(tmp_path, callbacks=[RehearsalCallback(section)], kind=kind_of(name, module))
    job.train()
    assert len(recorder.batches) == 8


def test_a_share_of_generated_batches_of_zero_is_none(tmp_path: Path) -> None:
    job, recorder = trainer(tmp_path, callbacks=[RehearsalCallback(SECTION)], kind=kind_of("GKDTrainer"))
    job.args.lmbda = 0.0  # type: ignore[attr-defined]
    job.train()
    assert len(recorder.batches) == 8


def test_a_training_loop_of_the_trainer_itself_is_refused(tmp_path: Path) -> None:
    def train(job: Any) -> None:
        job.control = job.callback_handler.on_train_begin(job.args, job.state, job.control)

    job, _ = trainer(tmp_path, callbacks=[RehearsalCallback(SECTION)], kind=kind_of("Mine", "mine", train=train))
    with pytest.raises(ConfigError, match=r"train\(\) of the trainer does not call Trainer\.train"):
        job.train()
