"""Training of one arm of the ptychography study: the course of tasks, the loop, the errors."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from scripts.studies.arms import SCRATCH, Arm, Row, evaluation_row
from scripts.studies.diffraction import Samples
from scripts.studies.knobs import Knobs
from scripts.studies.learner import Batch, Learner, rehearsal_section
from scripts.studies.ptychography_plan import METRICS, Course, Size
from scripts.studies.reconstruction_model import PtychoNet, reconstruction_loss
from scripts.studies.results import group_seeds
from scripts.studies.run_arms import ArmResults, Job, progress_of, train_all
from scripts.studies.scan_stream import DRIFTS, Producer

__all__ = ["train_arms"]

TARGETS = ("amplitude", "phase")


def new_learner(arm: Arm, knobs: Knobs, course: Course) -> Learner:
    """The network of an arm; where its method replays, it begins after `course.start_task` tasks."""
    torch.manual_seed(arm.seed)
    section = rehearsal_section(arm, knobs, course.capacity(arm))
    if section is not None:
        section["start_step"] = course.start_task * course.steps
    fields = ("diffraction", *TARGETS)
    return Learner(PtychoNet(), partial(torch.optim.Adam, lr=knobs.lr), reconstruction_loss, fields, section)


@dataclass
class ArmTrainer:
    """Trains the arms on a rank, one after the other, on samples of one producer."""

    size: Size
    producer: Producer
    progress: tqdm[Any]

    def train(self, drift: str, arm: Arm, knobs: Knobs) -> list[Row]:
        """All tasks as they arrive with an evaluation after each, or all of them mixed for the upper bound."""
        course, waited = self.size.course, self.producer.waited_s
        plan = course.plan(drift, arm.seed, dist.get_rank())
        held_out = [tensors(samples) for samples in plan.held_out(course.scans)]
        constants = errors_of_a_constant(held_out)
        # The upper bound takes as many samples a step as those that replay.
        stream = self.producer.stream(plan, shuffled=self.size.rows_a_step if arm.method == SCRATCH else None)
        seconds, rows = 0.0, []
        with closing(new_learner(arm, knobs, course)) as learner:
            for task in range(1, course.tasks + 1):
                seconds += self._steps(learner, islice(stream, course.steps))
                if arm.method == SCRATCH and task < course.tasks:
                    continue
                values, memory = errors(learner.model.module, held_out), learner.buffer_mib()
                wait = self.producer.waited_s - waited
                rows.append(
                    evaluation_row(
                        arm,
                        task,
                        values,
                        seconds=seconds,
                        buffer_mib=memory,
                        constants=constants,
                        waited_s=wait,
                        drift=drift,
                        **vars(knobs),
                    )
                )
        return rows

    def _steps(self, learner: Learner, stream: Iterator[Samples]) -> float:
        """A step for each mini-batch; the seconds that took."""
        dist.barrier()
        start = time.perf_counter()
        for samples in stream:
            learner.step(tensors(samples))
            self.progress.update()
        return time.perf_counter() - start


def train_arms(arms: Sequence[tuple[str, Arm, Knobs]], size: Size, folder: Path, *, resume: bool) -> list[Row]:
    """The rows of every arm of every drift."""
    settings = asdict(size.course) | {"ranks": dist.get_world_size(), "rows_a_step": size.rows_a_step}
    steps = len(arms) * size.course.tasks * size.course.steps
    with Producer() as producer, progress_of(steps) as progress:
        trainer = ArmTrainer(size, producer, progress)
        jobs = [
            Job(
                f"{drift}, {arm.name}",
                arm,
                ArmResults(folder / drift, settings | DRIFTS[drift] | asdict(knobs)),
                partial(trainer.train, drift, arm, knobs),
            )
            for drift, arm, knobs in arms
        ]
        return train_all(jobs, describe_result, progress, resume=resume)


def describe_result(rows: Sequence[Row]) -> str:
    """One arm's result on a line."""
    table = rows[0]["table"]
    ends = [f"{metric.label} {group_seeds(rows, metric, table)[0].average.text(4)}" for metric in METRICS]
    return f"{', '.join(ends)}, {rows[-1]['seconds']:.1f} s"


@torch.no_grad()
def errors(model: torch.nn.Module, held_out: list[Batch]) -> dict[str, list[float]]:
    """Mean absolute errors on the held-out samples of every task; each rank looks at objects of its own."""
    return _errors([(batch, model(batch["diffraction"])) for batch in held_out])


def errors_of_a_constant(held_out: list[Batch]) -> dict[str, list[float]]:
    """The same errors of the answer that is best for all pixels of a task on this rank: their median."""
    return _errors([(batch, [batch[name].median() for name in TARGETS]) for batch in held_out])


def _errors(answers: Iterable[tuple[Batch, Sequence[Tensor]]]) -> dict[str, list[float]]:
    own = [
        [(ours - batch[name]).abs().mean().item() for name, ours in zip(TARGETS, maps, strict=True)]
        for batch, maps in answers
    ]
    sums = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(sums)
    means = (sums / dist.get_world_size()).T.tolist()
    return {f"{name}_error": by_task for name, by_task in zip(TARGETS, means, strict=True)}


def tensors(samples: Samples) -> Batch:
    """The same memory as tensors, by name."""
    return {name: torch.from_numpy(field) for name, field in samples._asdict().items()}
