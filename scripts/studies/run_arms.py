"""Trains the arms of a study one after the other, and goes on where an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from scripts.common.report import write_text
from scripts.studies.arms import Arm, Row

__all__ = ["ArmResults", "Job", "progress_of", "train_all"]


@dataclass(frozen=True)
class ArmResults:
    """Rows of finished arms, one file each, so that an interrupted study can go on.

    Attributes:
        folder: Made where it is missing.
        settings: All that changes the result beside the arm; other settings are other files.
    """

    folder: Path
    settings: Mapping[str, object]

    def path(self, arm: Arm) -> Path:
        """The file of an arm."""
        key = json.dumps([asdict(arm), self.settings], sort_keys=True).encode()
        name = re.sub(r"[^a-z0-9+.]+", "_", arm.name)
        return self.folder / f"{name}-{hashlib.sha256(key).hexdigest()[:8]}.json"

    def save(self, arm: Arm, rows: Sequence[Row]) -> None:
        """Write the rows of a finished arm."""
        write_text(self.path(arm), json.dumps(rows, indent=1) + "\n")

    def load(self, arm: Arm) -> list[Row] | None:
        """The rows of an arm; None where it is not finished."""
        path = self.path(arm)
        if not path.is_file():
            return None
        rows: list[Row] = json.loads(path.read_text())
        return rows


@dataclass(frozen=True)
class Job:
    """An arm to be trained.

    Attributes:
        name: For a person.
        arm: The arm.
        results: File of its rows.
        train: Trains it on all ranks; its rows.
    """

    name: str
    arm: Arm
    results: ArmResults
    train: Callable[[], list[Row]]


def train_all(
    jobs: Sequence[Job], describe: Callable[[list[Row]], str], progress: tqdm[Any], *, resume: bool
) -> list[Row]:
    """The rows of every job; rank 0 keeps those of each as soon as it is done, and tells its result on a line."""
    done = [job.results.load(job.arm) if resume else None for job in jobs]
    dist.barrier()  # nobody writes before all have looked
    rows: list[Row] = []
    for number, (job, finished) in enumerate(zip(jobs, done, strict=True), 1):
        progress.set_description(job.name)
        fresh = finished or job.train()
        if dist.get_rank() == 0:
            job.results.save(job.arm, fresh)
            tqdm.write(f"{number} of {len(jobs)}: {job.name}: {describe(fresh)}")
        rows += fresh
    return rows


def progress_of(steps: int) -> tqdm[Any]:
    """A bar on rank 0 of a terminal; elsewhere the lines of the arms are enough."""
    hidden = None if dist.get_rank() == 0 else True
    return tqdm(total=steps, unit="step", disable=hidden, leave=False, smoothing=0.05)
