"""Step and run of the buffer in DeepSpeed's own files: which rehearsal files belong to them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.errors import CheckpointError
from rehearsal_plugin.integrations.deepspeed.checkpoints import load_checkpoint, save_checkpoint
from rehearsal_plugin.integrations.handle import Handle

ENGINE = SimpleNamespace(global_steps=7)


class Files:
    """What an engine writes and reads: the client state of the last save that was not broken off."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, dict[str, Any]()

    def save(self, save_dir: str, tag: str | None = None, client_state: Any = None, save_latest: bool = True) -> bool:
        self.state = dict(client_state or {})
        return save_latest

    def load(self, load_dir: str, tag: str | None = None, load_module_only: bool = False) -> tuple[str, dict[str, Any]]:
        return str(self.folder / "last" / "mp_rank_00_model_states.pt"), dict(self.state)


def handle(steps: int, value: float) -> Handle:
    rehearsal = Rehearsal({"buffer": {"capacity": 100}, "representatives": 2}, LocalTransport())
    for _ in range(steps):
        rehearsal.update({"x": torch.full((4,), value)})
    return Handle(rehearsal)


def test_the_buffer_of_the_model_is_loaded_though_a_later_one_is_there(tmp_path: Path) -> None:
    files, first, second, third = Files(tmp_path), handle(20, 1.0), handle(6, 2.0), handle(0, 0.0)
    assert save_checkpoint(ENGINE, first, files.save, str(tmp_path), "last", {"epoch": 3}, save_latest=False) is False
    second.save(tmp_path / "last")  # and the job ends before DeepSpeed writes
    _, state = load_checkpoint(ENGINE, third, files.load, str(tmp_path), "last")
    assert state == {"epoch": 3}
    assert third.rehearsal is not None
    assert third.rehearsal.steps == 20
    save_checkpoint(ENGINE, second, files.save, str(tmp_path), tag="last")
    load_checkpoint(ENGINE, third, files.load, str(tmp_path))
    assert third.rehearsal.steps == 6
    for each in (first, second, third):
        each.close()


def test_a_model_whose_buffer_is_gone_gets_no_other(tmp_path: Path) -> None:
    files, first, second = Files(tmp_path), handle(20, 1.0), handle(6, 2.0)
    save_checkpoint(ENGINE, first, files.save, str(tmp_path), "last")
    for path in (tmp_path / "last").iterdir():
        path.unlink()
    second.save(tmp_path / "last")
    with pytest.raises(CheckpointError, match="rehearsal files of another run"):
        load_checkpoint(ENGINE, second, files.load, str(tmp_path))
    for each in (first, second):
        each.close()


def test_a_disabled_handle_leaves_the_client_state_alone(tmp_path: Path) -> None:
    files = Files(tmp_path)
    save_checkpoint(ENGINE, Handle(None), files.save, str(tmp_path), "last", {"epoch": 1})
    assert files.state == {"epoch": 1}
