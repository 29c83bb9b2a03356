"""`python -m rehearsal_plugin.run` under `horovodrun`: the usual training scripts, as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.common.launch import free_port
from tests.helpers.horovod_ranks import ROOT, Job, horovodrun
from tests.helpers.paths import JOBS
from tests.helpers.witness import config_of

JOB = JOBS / "horovod_train.py"
TEST = 1_000_000  # ids of test samples begin here
SIZE, STEPS = 8, 12  # rows of a batch, batches of three epochs of 32 rows a rank


def run(folder: Path, section: dict[str, Any], *arguments: str, size: int = 2) -> tuple[Job, list[dict[str, Any]]]:
    pytest.importorskip("horovod.torch")
    config = folder / "rehearsal.yaml"
    config.write_text(json.dumps({"rehearsal": {"buffer": {"capacity": 1000}, "representatives": 3, **section}}))
    start = ["-m", "rehearsal_plugin.run", "--rehearsal-config", config, JOB, "--out", folder, *arguments]
    job = horovodrun(["-np", str(size)], *start, timeout_s=90)
    return job, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size) if not job.status]


def check(notes: list[dict[str, Any]], folder: Path, *arguments: str) -> None:
    """What holds for every job: the script was started as always, test data are as they are, ranks agree."""
    for note in notes:
        assert note["argv"] == [str(JOB), "--out", str(folder), *arguments]
        assert note["path"] == str(JOB.parent)
        assert note["identical"]
        plain = [list(range(TEST + i, min(TEST + i + 7, TEST + 24))) for i in range(0, 24, 7)]
        assert note["test"] == plain * 3
        labels = [[id % 5 for id in ids] for ids in note["train"]]
        assert note["labels"] == labels, "the label of a row belongs to it"


@pytest.mark.horovod
def test_loader_append_for_a_loss_outside_the_model(tmp_path: Path) -> None:
    job, notes = run(tmp_path, {"inject": "loader"}, "--loss", "outside")
    job.succeeded()
    check(notes, tmp_path, "--loss", "outside")
    for note in notes:
        assert [len(ids) for ids in note["train"]] == note["rows"]
        # The model is still in evaluation mode only while the test set is read.
        assert note["rows"] == [SIZE] * 3 + [SIZE + 3] * (STEPS - 3)
        assert all(id < TEST for ids in note["train"] for id in ids), "test data was stored"


@pytest.mark.horovod
def test_loader_replace_skips_no_row(tmp_path: Path) -> None:
    job, notes = run(tmp_path, {"inject": "loader", "mode": "replace"}, "--loss", "outside")
    job.succeeded()
    check(notes, tmp_path, "--loss", "outside")
    for note in notes:
        assert [len(ids) for ids in note["train"]] == note["rows"]
        assert set(note["rows"]) <= set(range(1, SIZE + 1))
        assert len(note["rows"]) > STEPS, "an epoch has more batches"
    read = {id for note in notes for ids in note["train"] for id in ids}
    assert read == set(range(64))


@pytest.mark.horovod
def test_forward_for_a_model_that_computes_the_loss(tmp_path: Path) -> None:
    job, notes = run(tmp_path, {"mode": "append"}, "--loss", "inside")
    job.succeeded()
    check(notes, tmp_path, "--loss", "inside")
    for note in notes:
        assert {len(ids) for ids in note["train"]} == {SIZE}
        assert note["rows"] == [SIZE] * 3 + [SIZE + 3] * (STEPS - 3)


def test_a_deepspeed_config_without_a_block_takes_that_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "ds_config.json").write_text(json.dumps(config_of()))
    (tmp_path / "rehearsal.yaml").write_text("{representatives: 3, buffer: {capacity: 50}}")
    script = [str(JOB.parent / "train.py"), "--out", str(tmp_path), "--deepspeed_config", f"{tmp_path}/ds_config.json"]
    command = [sys.executable, "-m", "rehearsal_plugin.run", "--rehearsal-config", f"{tmp_path}/rehearsal.yaml"]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **place, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, *script], env=environment, cwd=ROOT, timeout=90, check=True, capture_output=True)
    note = json.loads((tmp_path / "rank0.json").read_text())
    assert note["sizes"] == [SIZE] * 3 + [SIZE + 3] * 2


def told(code: str) -> str:
    """The last line of the error of `rehearsal_plugin.run` after `code`."""
    script = f"import sys; {code}; from rehearsal_plugin.run import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "--rehearsal-config", "configs/horovod_rehearsal.yaml", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_without_a_framework_the_error_says_what_to_install() -> None:
    missing = "import importlib.util as u; find = u.find_spec; "
    missing += (
        "u.find_spec = lambda name, *a: None if name in ('deepspeed', 'horovod', 'transformers') else find(name, *a)"
    )
    message = told(missing)
    assert "MissingDependencyError" in message
    assert "scripts/install_horovod.sh" in message
    assert "rehearsal_plugin[deepspeed]" in message


def test_an_unusable_file_is_named() -> None:
    command = [sys.executable, "-m", "rehearsal_plugin.run", "--rehearsal-config", "nowhere.yaml", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "'nowhere.yaml' is no file; correct the path" in done.stderr
