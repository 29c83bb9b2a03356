"""Trainers whose hosts have a folder each (`save_on_each_node`): all ranks resume from one checkpoint, or none does."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.torch_version import TorchVersion

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from rehearsal_plugin import RehearsalCallback
from rehearsal_plugin.errors import CheckpointError
from tests.helpers.ranks import run_ranks
from tests.helpers.trainer_jobs import digest, losses, trainer

SECTION: dict[str, Any] = {"buffer": {"capacity": 60}, "representatives": 2, "exchange": {"timeout_s": 20}}


def run(folder: Path, resume: bool) -> tuple[str, list[float]]:
    """Digest and last losses of a job of ten steps that saves after three and six."""
    callback = RehearsalCallback(SECTION)
    saving: dict[str, Any] = {"max_steps": 10, "save_strategy": "steps", "save_steps": 3, "save_on_each_node": True}
    job, _ = trainer(folder, callbacks=[callback], local_rank=0, **saving)
    try:
        job.train(resume_from_checkpoint=resume)
    finally:
        callback.close()
    return digest(job.model), losses(job)[-1:]


def resume_on_hosts(root: Path) -> list[Any]:
    """The whole job, the resumed one, and what is said where host 2 lacks the newest checkpoint."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # one rank a host
        disk = root / f"disk{rank}"
        results: list[Any] = [run(disk, resume=False)]
        shutil.rmtree(disk / "checkpoint-9")
        shutil.rmtree(disk / "checkpoint-10")
        dist.barrier()
        for path in (root / "disk0" / "checkpoint-6").iterdir():  # transformers 5 writes the model on one host alone
            if not (disk / "checkpoint-6" / path.name).exists() and not path.name.startswith("rehearsal-"):
                shutil.copy(path, disk / "checkpoint-6")
        results.append(run(disk, resume=True))
        for gone in [path for path in disk.iterdir() if rank == 1 and path.name != "checkpoint-3"]:
            shutil.rmtree(gone)
        dist.barrier()
        try:
            run(disk, resume=True)
        except CheckpointError as error:
            results.append(str(error))
        return results


@pytest.mark.skipif(
    TorchVersion(version("transformers")) < "5",
    reason="the Trainer of transformers 4 loads its optimizer to 'cpu:0' on a rank that has a GPU's number, and fails",
)
def test_ranks_resume_from_the_same_checkpoint_or_none_does(tmp_path: Path) -> None:
    for whole, resumed, refusal in run_ranks(resume_on_hosts, 2, tmp_path, timeout_s=150):
        assert resumed == whole
        assert "rank 0: checkpoint-10; rank 1: checkpoint-3" in refusal
