"""Bars on a terminal, and silence in a pipe."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from tests.helpers.samples import new_batch

COMMAND = [sys.executable, "-m", "rehearsal_plugin.cli"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    with Rehearsal({"buffer": {"capacity": 100}}, LocalTransport()) as rehearsal:
        for step in range(8):
            rehearsal.update(new_batch(0, step, 6))
        rehearsal.save(folder)
    return folder


def commands(checkpoint: Path, out: Path) -> dict[str, list[str]]:
    """What each shows, and the command."""
    exported = out / "rows.safetensors"
    return {
        "ranks": [*COMMAND, "reshard", str(checkpoint), str(out / "shared"), "--ranks", "3"],
        "reading": [*COMMAND, "inspect", str(checkpoint)],
        "writing": [*COMMAND, "export", str(checkpoint), str(exported)],
        "rows": [*COMMAND, "seed", "--data", str(exported), "--out", str(out / "seed")],
    }


def test_a_pipe_gets_the_result_alone(checkpoint: Path, tmp_path: Path) -> None:
    for command in commands(checkpoint, tmp_path).values():
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout
        assert not done.stderr


def test_a_terminal_shows_what_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    for shown, command in commands(checkpoint, tmp_path).items():
        assert shown in on_a_terminal(command)


def on_a_terminal(command: list[str]) -> str:
    """What a command writes to a terminal as its standard error."""
    ours, its = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=its) as job:
        os.close(its)
        parts = []
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:  # so the other end is closed
            pass
        finally:
            os.close(ours)
    assert job.returncode == 0
    return b"".join(parts).decode()
