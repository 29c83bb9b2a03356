"""A Trainer on two ranks of `torchrun`, in releases of transformers before 5: replay, and a job that is resumed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from scripts.common.launch import free_port
from tests.helpers.clients.claims import assert_replay, assert_same_from
from tests.helpers.clients.runs import Run, run_client, section_file

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(
        int(metadata.version("transformers").partition(".")[0]) >= 5,
        reason="tests/integrations has it for this release",
    ),
]


def run_trainer(folder: Path, *options: object, section: Path | None = None) -> Run:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    job = [*torchrun, "-m", "tests.helpers.clients.jobs.hf_trainer", *options]
    return run_client(job, folder, section=section, may_abort=True)  # a Trainer leaves its process group to the exit


@pytest.mark.parametrize("passes", [1, 2])
def test_rows_are_replayed_and_a_resumed_job_goes_on_bit_for_bit(tmp_path: Path, passes: int) -> None:
    section, options = section_file(tmp_path), ["--passes", passes]
    plain = run_trainer(tmp_path / "plain", tmp_path / "a", *options)
    whole = run_trainer(tmp_path / "whole", tmp_path / "b", *options, section=section)
    assert_replay(plain, whole, passes=passes)
    again = [tmp_path / "c", *options, "--resume", tmp_path / "b" / "checkpoint-5"]
    assert_same_from(whole, run_trainer(tmp_path / "again", *again, section=section), 5 * passes)
