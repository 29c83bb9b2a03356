"""Training of one arm of the classification study: the network, the order of the images, the loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from scripts.common.image_data import ImageData
from scripts.studies.arms import SCRATCH, Arm, Row, evaluation_row
from scripts.studies.knobs import Knobs
from scripts.studies.learner import Batch, Learner, rehearsal_section

__all__ = ["TASKS", "Course", "hold_out", "new_learner", "train"]

TASKS, CLASSES_PER_TASK = 5, 2
CLASSES = TASKS * CLASSES_PER_TASK
FALL = 0.1
"""Share of all steps, at the end, over which the learning rate falls to zero."""


class Block(nn.Module):
    """Two convolutions beside a shortcut. The norms look at one image alone, so small batches do them no harm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.GroupNorm(outputs // 8, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(outputs // 8, outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, outputs, height / stride, width / stride]`."""
        out: Tensor = self.body(x) + self.shortcut(x)
        return out.relu()


class ResNet(nn.Module):
    """A residual network of eight layers, 78,000 parameters: uint8 images `[batch, h, w]` to scores `[batch, 10]`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, padding=1, bias=False), nn.GroupNorm(width // 8, width), nn.ReLU()
        )
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.classifier = nn.Linear(4 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of all classes; nothing tells the network which task an image is from."""
        features = self.blocks(self.stem(images.unsqueeze(1).float() / 127.5 - 1))
        scores: Tensor = self.classifier(features.mean((2, 3)))
        return scores


def new_learner(arm: Arm, knobs: Knobs, capacity: int) -> Learner:
    """The network of an arm, with a buffer of `capacity` rows on each rank where its method replays."""
    torch.manual_seed(arm.seed)
    return Learner(
        ResNet(),
        partial(torch.optim.SGD, lr=knobs.lr, momentum=0.9),
        functional.cross_entropy,
        ("images", "labels"),
        rehearsal_section(arm, knobs, capacity),
    )


def slow_down(optimizer: torch.optim.Optimizer, lr: float, done: float) -> None:
    """Let the learning rate fall in a line to zero over the last steps, `done` being the share of all behind it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (1 - done) / FALL)


@dataclass(frozen=True)
class Course:
    """The images, how many of them a step takes, and this rank's place.

    Attributes:
        steps: Optimizer steps a task.
        batch: New images a step and rank.
        representatives: Replayed images a step and rank of the methods with a buffer.
    """

    images: ImageData
    steps: int
    batch: int
    representatives: int
    rank: int
    ranks: int

    def capacity(self, arm: Arm) -> int:
        """Rows of a rank's buffer."""
        return int(len(self.images.train_labels) * arm.buffer_percent / 100 / self.ranks)

    def task(self, task: int, seed: int) -> Iterator[Batch]:
        """This rank's batches of one task, counted from 0."""
        rows = np.flatnonzero(self.images.train_labels // CLASSES_PER_TASK == task)
        return self._batches(rows, self.steps, self.batch, (seed, task))

    def shuffled(self, steps: int, batch: int, seed: int) -> Iterator[Batch]:
        """This rank's batches of all tasks at once."""
        return self._batches(np.arange(len(self.images.train_labels)), steps, batch, (seed, TASKS))

    def _batches(self, rows: NDArray[np.int64], steps: int, batch: int, key: tuple[int, int]) -> Iterator[Batch]:
        """Goes round in a new order each time where there are fewer rows than the steps take."""
        rng, needed = np.random.default_rng(key), steps * self.ranks * batch
        order = np.concatenate([rng.permutation(rows) for _ in range(-(-needed // len(rows)))])[:needed]
        for chosen in order.reshape(steps, self.ranks, batch)[:, self.rank]:
            images, labels = self.images.train_images[chosen], self.images.train_labels[chosen]
            yield {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> list[float]:
        """Accuracy on each task's test images, among all classes; a rank looks at its share."""
        share = slice(self.rank, None, self.ranks)
        images = torch.from_numpy(self.images.test_images[share].copy())
        labels = torch.from_numpy(self.images.test_labels[share].copy())
        right = torch.cat([model(part).argmax(1) for part in images.tensor_split(20)]) == labels
        counts = torch.zeros(2, TASKS)
        for line, weight in zip(counts, (right.float(), torch.ones(len(labels))), strict=True):
            line.index_add_(0, labels // CLASSES_PER_TASK, weight)
        dist.all_reduce(counts)
        accuracies: list[float] = (counts[0] / counts[1]).tolist()
        return accuracies

    def constant(self) -> list[float]:
        """Accuracy on each task of the answer that is always the same class, its most frequent one."""
        counts = np.bincount(self.images.test_labels, minlength=CLASSES).reshape(TASKS, CLASSES_PER_TASK)
        accuracies: list[float] = (counts.max(1) / counts.sum(1)).tolist()
        return accuracies


def train(arm: Arm, knobs: Knobs, course: Course, progress: tqdm[Any]) -> list[Row]:
    """One arm, with an evaluation after each task."""
    learner, seconds, rows = new_learner(arm, knobs, course.capacity(arm)), 0.0, []
    steps, constants = itertools.count(), {"accuracy": course.constant()}
    for after_task, batches in _batches_before_evaluations(arm, course):
        dist.barrier()
        start = time.perf_counter()
        for batch in batches:
            slow_down(learner.optimizer, knobs.lr, next(steps) / (TASKS * course.steps))
            learner.step(batch)
            progress.update()
        seconds += time.perf_counter() - start
        values = {"accuracy": course.evaluate(learner.model.module)}
        measured: dict[str, Any] = {"seconds": seconds, "buffer_mib": learner.buffer_mib(), "constants": constants}
        rows.append(evaluation_row(arm, after_task, values, **measured, **asdict(knobs)))
    learner.close()
    return rows


def _batches_before_evaluations(arm: Arm, course: Course) -> list[tuple[int, Iterator[Batch]]]:
    """Batches before each evaluation, and the number of tasks trained by then.

    From scratch, all images come shuffled in as many steps, and a step has as many rows as one with rehearsal, so
    that the upper bound has as much computation.
    """
    if arm.method == SCRATCH:
        rows = course.batch + course.representatives
        return [(TASKS, course.shuffled(TASKS * course.steps, rows, arm.seed))]
    return [(task + 1, course.task(task, arm.seed)) for task in range(TASKS)]


def hold_out(images: ImageData) -> ImageData:
    """A tenth of the training images takes the place of the test images, so that those choose nothing."""
    order = np.random.default_rng(0).permutation(len(images.train_labels))
    test, train = order[: len(order) // 10], order[len(order) // 10 :]
    return ImageData(
        f"{images.name}, a tenth of the training images held out",
        images.train_images[train],
        images.train_labels[train],
        images.train_images[test],
        images.train_labels[test],
    )
