"""`python -m rehearsal_plugin.run` with scripts that start their ranks themselves, or that attach nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.common.launch import free_port
from tests.helpers.paths import JOBS
from tests.helpers.witness import config_of
from tests.integrations.test_run import ENDS, notes, start, succeed

pytest.importorskip("deepspeed")

NOTHING = "rehearsal_plugin.run: nothing was attached"
RUN = ("-m", "rehearsal_plugin.run")
ATTACHES = "from rehearsal_plugin import Rehearsal\nRehearsal({'buffer': {'capacity': 9}, 'ratio': 0.1}).close()\n"


def ranks_of(folder: Path, how: str, *options: str) -> tuple[list[list[int]], subprocess.CompletedProcess[str]]:
    """Sizes of the batches of two ranks that a script started itself."""
    config = folder / "ds_config.json"
    config.write_text(json.dumps(config_of({"representatives": 2, "buffer": {"capacity": 50}})))
    given = ["--out", folder, "--deepspeed_config", config]
    done = start(*RUN, *options, JOBS / "starts_ranks.py", how, free_port(), *given, folder=folder)
    succeed(done)
    return [note["sizes"] for note in notes(folder)], done


@pytest.mark.parametrize("how", ["spawn", "torchrun", "torchrun run"])
def test_ranks_that_the_script_starts_are_reached(tmp_path: Path, how: str) -> None:
    sizes, done = ranks_of(tmp_path, how, "--strict")
    assert sizes == [[8, 8, 8, 10, 10]] * 2
    assert NOTHING not in done.stderr


def test_without_children_they_are_left_alone_and_that_is_said(tmp_path: Path) -> None:
    sizes, done = ranks_of(tmp_path, "spawn", "--no-children")
    assert sizes == [[8] * 5] * 2
    assert done.stderr.count(NOTHING) == 1


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--strict"], 3)])
def test_a_script_that_attaches_nothing_is_told_at_its_end(options: list[str], status: int) -> None:
    done = start(*RUN, *options, ENDS, "path")
    assert done.returncode == status
    assert done.stderr.rstrip().splitlines()[-1].startswith(NOTHING)


def test_the_status_of_a_script_that_failed_stays() -> None:
    done = start(*RUN, "--strict", ENDS, "7")
    assert done.returncode == 7
    assert NOTHING in done.stderr


@pytest.mark.parametrize("where", ["here", "in a child", "in the run of a child"])
def test_a_rehearsal_anywhere_is_enough(tmp_path: Path, where: str) -> None:
    script, parent = tmp_path / "attaches.py", tmp_path / "parent.py"
    script.write_text(ATTACHES)
    command = [sys.executable, *(RUN if where == "in the run of a child" else []), str(script)]
    parent.write_text(f"import subprocess\nsubprocess.run({command!r}, check=True)\n")
    done = start(*RUN, "--strict", script if where == "here" else parent)
    succeed(done)
    assert NOTHING not in done.stderr


def test_a_sitecustomize_of_the_user_still_runs_in_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.users_own = 'ran'\n")
    child = "import sys; print('own', users_own, 'torch' in sys.modules, sys.modules['sitecustomize'].__file__)"
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, subprocess, sys\n"
        f"os.environ['PYTHONPATH'] += os.pathsep + {str(tmp_path)!r}\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    )
    done = start(*RUN, script)
    succeed(done)
    own = next(line for line in done.stdout.splitlines() if line.startswith("own"))
    assert own.split() == ["own", "ran", "False", str(tmp_path / "sitecustomize.py")]
