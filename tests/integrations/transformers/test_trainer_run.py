"""Scripts with a Trainer under the launchers: one line, and no line at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.common.launch import free_port
from tests.helpers.paths import JOBS
from tests.integrations.test_run import DEEPSPEED, TORCHRUN, start, succeed

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

JOB = JOBS / "trainer.py"
NEW, ADDED = 4, 2
SECTION = {"buffer": {"capacity": 60}, "representatives": ADDED}
ENGINE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "rehearsal": SECTION,
}
INFERENCE = {**ENGINE, "zero_optimization": {"stage": 3}}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Configs, by what they hold."""
    contents = {"engine": ENGINE, "inference": INFERENCE, "section": SECTION}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {name: tmp_path / f"{name}.json" for name in contents}


def notes(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def job(folder: Path, launcher: tuple[str, ...], *arguments: object, plugin: tuple[object, ...] = ()) -> Any:
    """What a job noted; `plugin` is what stands before the script without a line."""
    folder.mkdir()
    port = () if not launcher else (free_port(),)
    ranks = 2 if launcher else 1
    succeed(start(*launcher, *port, *plugin, JOB, "--out", folder, *arguments))
    found = notes(folder, ranks)
    assert {tuple(note["sizes"][-2:]) for note in found} == {(NEW + ADDED,) * 2}, "every micro-batch had its rows"
    return found


def test_with_deepspeed_one_line_and_none_are_the_same(tmp_path: Path, files: dict[str, Path]) -> None:
    engine = ("--deepspeed", files["engine"])
    one = job(tmp_path / "one", DEEPSPEED, *engine, "--callback", "yes")
    none = job(tmp_path / "none", DEEPSPEED, *engine, plugin=("--module", "rehearsal_plugin.run"))
    assert one == none


def test_without_deepspeed_one_line_and_none_are_the_same(tmp_path: Path, files: dict[str, Path]) -> None:
    run = ("-m", "rehearsal_plugin.run", "--rehearsal-config", files["section"])
    one = job(tmp_path / "one", TORCHRUN, "--callback", files["section"])
    none = job(tmp_path / "none", TORCHRUN, plugin=run)
    assert one == none
    job(tmp_path / "alone", (), plugin=run)


def test_a_job_that_only_evaluates_sees_its_own_rows(tmp_path: Path, files: dict[str, Path]) -> None:
    arguments = ("--out", tmp_path, "--deepspeed", files["inference"], "--evaluate")
    succeed(start(*DEEPSPEED, free_port(), "--module", "rehearsal_plugin.run", JOB, *arguments))
    for note in notes(tmp_path, 2):
        assert note["sizes"] == [8, 8]
        assert note["loss"] > 0
