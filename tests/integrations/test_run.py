"""`python -m rehearsal_plugin.run`: scripts as they are, under the launchers of DeepSpeed and torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.common.launch import free_port
from tests.helpers.paths import JOBS, ROOT
from tests.helpers.witness import config_of

pytest.importorskip("deepspeed")

JOB = JOBS / "train.py"
ENDS = JOBS / "ends.py"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")
DEEPSPEED = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port")


def start(*arguments: object, folder: Path = ROOT, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """A Python process with the package on its path and not in its working directory's way."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, timeout=timeout_s, capture_output=True, text=True, check=False
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config_of({"representatives": 2, "buffer": {"capacity": 50}})))
    return path


def notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def succeed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "terminate called" not in done.stderr


def test_the_deepspeed_launcher_runs_an_untouched_script(tmp_path: Path, config: Path) -> None:
    given = ["--out", str(tmp_path), "--deepspeed_config", str(config)]
    succeed(start(*DEEPSPEED, free_port(), "--module", "rehearsal_plugin.run", JOB, *given, folder=tmp_path))
    for rank, note in enumerate(notes(tmp_path)):
        assert note["argv"] == [str(JOB), f"--local_rank={rank}", *given]
        assert note["path"] == str(JOB.parent)
        assert note["main"] == str(JOB)
        assert note["sizes"] == [8, 8, 8, 10, 10]


def test_rank_0_says_that_rehearsal_is_on_and_what_came_of_it(tmp_path: Path, config: Path) -> None:
    given = ["--out", str(tmp_path), "--deepspeed_config", str(config)]
    done = start(*TORCHRUN, free_port(), "-m", "rehearsal_plugin.run", JOB, *given, folder=tmp_path)
    succeed(done)
    assert done.stderr.count("rehearsal: a row is x float32 [4]") == 1
    assert done.stderr.count("replayed; the share of replayed rows was") == 1


LOGGING = """
import logging, sys, torch
import transformers.trainer
from rehearsal_plugin import Rehearsal
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
with Rehearsal({"buffer": {"capacity": 50}}) as rehearsal:
    rehearsal.update({"x": torch.zeros(8, 2)})
"""


def test_a_script_that_logs_gets_the_lines_in_its_own_log(tmp_path: Path, config: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "script.py").write_text(LOGGING)
    done = start("-m", "rehearsal_plugin.run", "--rehearsal-config", config, tmp_path / "script.py")
    succeed(done)
    assert done.stdout.count("INFO:rehearsal_plugin.runtime.job_report:rehearsal: a row is") == 1
    assert "a row is" not in done.stderr


def test_torchrun_runs_an_untouched_script(tmp_path: Path, config: Path) -> None:
    given = ["--out", str(tmp_path), "--deepspeed_config", str(config)]
    succeed(start(*TORCHRUN, free_port(), "-m", "rehearsal_plugin.run", JOB, *given, folder=tmp_path))
    for note in notes(tmp_path):
        assert note["argv"] == [str(JOB), *given]
        assert note["path"] == str(JOB.parent)
        assert note["sizes"] == [8, 8, 8, 10, 10]


def test_a_module_runs_as_one(tmp_path: Path, config: Path) -> None:
    given = ["--out", str(tmp_path), "--deepspeed_config", str(config)]
    succeed(start(*TORCHRUN, free_port(), "-m", "rehearsal_plugin.run", "-m", "tests.helpers.jobs.train", *given))
    for note in notes(tmp_path):
        assert note["argv"] == [str(JOB), *given]
        assert note["path"] == str(ROOT)
        assert note["main"] == str(JOB)
        assert note["sizes"] == [8, 8, 8, 10, 10]


@pytest.mark.fault
def test_a_rank_that_fails_ends_the_job_with_its_traceback(tmp_path: Path, config: Path) -> None:
    given = ["--out", str(tmp_path), "--deepspeed_config", str(config), "--fail"]
    done = start(*TORCHRUN, free_port(), "-m", "rehearsal_plugin.run", JOB, *given)
    assert done.returncode != 0
    assert f'File "{JOB}"' in done.stderr
    assert 'raise ValueError("told to fail")' in done.stderr
    assert not list(tmp_path.glob("rank*.json"))


@pytest.mark.parametrize("script", [[ENDS], ["-m", "tests.helpers.jobs.ends"]], ids=["script", "module"])
def test_an_exception_keeps_its_traceback(script: list[object]) -> None:
    done = start("-m", "rehearsal_plugin.run", *script, "raise")
    assert done.returncode == 1
    assert f'File "{ENDS}", line 10, in end\n    raise KeyError("lost")' in done.stderr
    assert done.stderr.rstrip().endswith("KeyError: 'lost'")


def test_an_exit_code_is_kept() -> None:
    assert start("-m", "rehearsal_plugin.run", ENDS, "7").returncode == 7


STOPPED = """
import sys, torch
from rehearsal_plugin import Rehearsal
rehearsal = Rehearsal({"buffer": {"capacity": 50}, "ratio": 0.25})
try:
    for step in range(10**9):
        rehearsal.update({"x": torch.zeros(8, 2)})
        if step == 5:
            print("running", flush=True)
finally:
    rehearsal.close()
    print(f"closed {rehearsal.closed}", flush=True)
"""


@pytest.mark.fault
def test_sigterm_lets_the_script_leave_cleanly(tmp_path: Path) -> None:
    script = tmp_path / "loop.py"
    script.write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rehearsal_plugin.run", str(script)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            while process.stdout.readline().strip() != "running":
                assert process.poll() is None, "the script ended by itself"
            process.terminate()
            printed, complaint = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, complaint
    assert printed.strip() == "closed True"
    assert "Traceback" not in complaint


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 is the first to have a safe path")
def test_pythons_safe_path_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    done = start("-m", "rehearsal_plugin.run", ENDS, "path")
    path = next(line for line in done.stdout.splitlines() if line.startswith("path:")).split()
    assert path[1] == str(ROOT)
    assert str(ENDS.parent) not in path


def test_no_script_is_a_usage_error() -> None:
    done = start("-m", "rehearsal_plugin.run")
    assert done.returncode == 2
    assert "the following arguments are required: script" in done.stderr


def test_help_ends_with_examples_for_each_launcher() -> None:
    shown = start("-m", "rehearsal_plugin.run", "--help").stdout
    for launcher in ("deepspeed", "torchrun", "horovodrun", "python -m rehearsal_plugin.run"):
        assert f"\n    {launcher} " in shown.partition("examples:")[2]


PROGRAM = """#!{python}
import sys
print("program:", sys.argv[0], *sys.argv[1:])
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in a folder of `PATH`."""
    path = tmp_path / "bin" / "trainer-of-models"
    path.parent.mkdir()
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return path


def test_a_program_is_found_in_the_path(tmp_path: Path, program: Path) -> None:
    (tmp_path / program.name).mkdir()  # such as a checkout: no script
    done = start("-m", "rehearsal_plugin.run", program.name, "sft", "--lr", "1", folder=tmp_path)
    succeed(done)
    assert f"program: {program} sft --lr 1" in done.stdout


def test_a_script_goes_before_a_program_of_its_name(tmp_path: Path, program: Path) -> None:
    (tmp_path / program.name).write_text("print('script')")
    done = start("-m", "rehearsal_plugin.run", program.name, folder=tmp_path)
    succeed(done)
    assert "script" in done.stdout.split()


@pytest.mark.parametrize("name", ["no-such-trainer", "./trainer-of-models"])
def test_what_is_no_script_and_no_program_is_named(tmp_path: Path, program: Path, name: str) -> None:
    done = start("-m", "rehearsal_plugin.run", name, folder=tmp_path)
    assert done.returncode == 2
    assert f"there is no script '{name}', and no program of that name in PATH" in done.stderr
