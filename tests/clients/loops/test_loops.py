"""Loops that call the plugin, on two ranks: Lightning's Trainer under DDP, and one as of nanoGPT under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightning")

from scripts.common.launch import free_port
from tests.helpers.clients.claims import assert_replay, assert_same_from
from tests.helpers.clients.runs import Run, run_client, section_file

pytestmark = pytest.mark.clients


def run_loop(name: str, folder: Path, *options: object) -> Run:
    module = f"tests.helpers.clients.jobs.{name}"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    return run_client([*([] if name == "lightning_ddp" else torchrun), "-m", module, *options], folder)


@pytest.mark.parametrize(("name", "passes"), [("lightning_ddp", 1), ("nanogpt_ddp", 2)])
def test_rows_are_replayed_and_a_resumed_loop_goes_on(tmp_path: Path, name: str, passes: int) -> None:
    section, saved = section_file(tmp_path), tmp_path / "saved"
    plain = run_loop(name, tmp_path / "plain")
    whole = run_loop(name, tmp_path / "whole", "--section", section, "--save", saved)
    assert_replay(plain, whole, passes=passes)
    resumed = run_loop(name, tmp_path / "resumed", "--section", section, "--resume", saved)
    assert_same_from(whole, resumed, 5 * passes)
