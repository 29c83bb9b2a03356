"""The command on a terminal that knows ASCII alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rehearsal_plugin import LocalTransport, Rehearsal


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_inspect_shows_any_name_of_a_field(encoding: str, tmp_path: Path) -> None:
    folder = tmp_path / "größe→"
    with Rehearsal({"buffer": {"capacity": 8}}, LocalTransport()) as rehearsal:
        rehearsal.update({"größe→": torch.zeros(4, 2)})
        rehearsal.save(folder)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "120"}
    command = [sys.executable, "-m", "rehearsal_plugin.cli"]
    shown = subprocess.run([*command, "inspect", str(folder)], env=environment, capture_output=True, check=False)
    assert shown.returncode == 0, shown.stderr
    expected = "gr\\xf6\\xdfe\\u2192" if encoding == "ascii" else "größe"
    assert expected in shown.stdout.decode(encoding)
    missing = subprocess.run(
        [*command, "inspect", str(tmp_path / "größe→→")], env=environment, capture_output=True, check=False
    )
    assert missing.returncode == 1
    assert b"no rehearsal checkpoint" in missing.stderr
