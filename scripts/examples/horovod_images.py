"""Class-incremental training on real images under Horovod, with and without rehearsal.

    python -m scripts.examples.horovod_images --ranks 2

starts itself on two ranks with `horovodrun`. Ten classes of images come in five tasks of two; no task comes
back. The two arms, `naive` and `rehearsal`, start from the same weights and see the same images in the same
order; the second has `rehearsal_plugin.attach` and the config file more. Writes `report.json` and
`accuracy.png` to `out/train_horovod`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.common.image_data import ImageData, load_images
from scripts.common.paths import ROOT
from scripts.examples.horovod_images_results import NAIVE, REHEARSAL, Arm, publish, show

TASKS, CLASSES_PER_TASK = 5, 2


class ConvNet(nn.Module):
    """Two convolutions and two linear layers over uint8 images `[batch, height, width]`.

    Computes its own loss from `model(images, labels)`, so that rows added to the batch on the way count too.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        features, classes = 32 * (height // 4) * (width // 4), TASKS * CLASSES_PER_TASK
        # Without the norms the first batches of new classes kill the units, and naive training learns nothing.
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(features, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, classes)
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean loss (a scalar) where labels `[batch]` are given, else scores `[batch, classes]`."""
        scores: Tensor = self.classifier(self.second(self.first(images.unsqueeze(1).float() / 255)))
        return scores if labels is None else functional.cross_entropy(scores, labels)


@dataclass
class Course:
    """The images, and in which order a rank sees them."""

    images: ImageData
    steps: int
    batch: int
    seed: int
    rank: int
    ranks: int

    def batches(self, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's `steps` batches of one task; goes round where the task has fewer images."""
        rows = np.flatnonzero(self.images.train_labels // CLASSES_PER_TASK == task)
        order = np.random.default_rng((self.seed, task)).permutation(rows)
        images, labels = self.images.train_images, self.images.train_labels
        for chosen in np.resize(order, (self.steps, self.ranks, self.batch))[:, self.rank]:
            yield torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> list[float]:
        """Accuracy on each task's test images, among all classes; a rank looks at its share."""
        import horovod.torch as hvd

        model.eval()
        share = slice(self.rank, None, self.ranks)
        images = torch.from_numpy(self.images.test_images[share].copy())
        labels = torch.from_numpy(self.images.test_labels[share].copy())
        right = torch.cat([model(part).argmax(1) for part in images.tensor_split(10)]) == labels
        counts = torch.zeros(2, TASKS)
        for row, weight in enumerate((right.float(), torch.ones(len(labels)))):
            counts[row].index_add_(0, labels // CLASSES_PER_TASK, weight)
        right_of_all, all_of_all = hvd.allreduce(counts, op=hvd.Sum, name="evaluate")
        model.train()
        accuracies: list[float] = (right_of_all / all_of_all).tolist()
        return accuracies


def train(name: str, course: Course, arguments: argparse.Namespace) -> Arm:
    """One arm: all tasks in order, an evaluation after each."""
    import horovod.torch as hvd

    import rehearsal_plugin

    torch.manual_seed(arguments.seed)
    model = ConvNet(*course.images.train_images.shape[1:])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    plain = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
    if name == NAIVE:
        return run_tasks(Arm(name), course, model, optimizer)
    with closing(rehearsal_plugin.attach(optimizer, model=model, config=arguments.config)):
        return run_tasks(Arm(name), course, model, optimizer)


def run_tasks(arm: Arm, course: Course, model: nn.Module, optimizer: torch.optim.Optimizer) -> Arm:
    """The training loop; fills in what was measured."""
    for task in range(TASKS):
        start = time.perf_counter()
        for images, labels in course.batches(task):
            model(images, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        arm.seconds += time.perf_counter() - start
        arm.accuracies.append(course.evaluate(model))
        if course.rank == 0:
            print(f"{arm.name}: task {task + 1} of {TASKS}, accuracy {arm.final:.3f}", flush=True)
    arm.ranks_identical = identical_on_all_ranks(model)
    return arm


def identical_on_all_ranks(model: nn.Module) -> bool:
    """Whether the parameters of all ranks agree in every bit, by their SHA-256 sums."""
    import horovod.torch as hvd

    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    sums = hvd.allgather(torch.tensor([list(digest.digest())], dtype=torch.uint8), name="digest")
    return bool((sums == sums[0]).all())


def run(arguments: argparse.Namespace) -> None:
    """One rank's part."""
    import horovod.torch as hvd

    torch.set_num_threads(1)  # Horovod's waiting ranks spin: more threads than cores would only fight
    hvd.init()
    course = Course(load_images(), arguments.steps, arguments.batch, arguments.seed, hvd.rank(), hvd.size())
    arms = [train(name, course, arguments) for name in (NAIVE, REHEARSAL)]
    if hvd.rank() == 0:
        publish(arms, course.images.name, arguments.out, hvd.size())
    hvd.shutdown()


def launch(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs `horovodrun` on this script, shows what it wrote, and returns its exit status."""
    load_images()  # so that the ranks find them in the cache
    command = [sys.executable, "-m", "horovod.runner.launch", "-np", str(arguments.ranks), "--gloo"]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    command += [sys.executable, "-m", "scripts.examples.horovod_images", *argv]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status == 0:
        show(arguments.out)
    return status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Class-incremental training, naive and with rehearsal.")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (%(default)s)")
    parser.add_argument("--steps", type=int, default=94, help="optimizer steps a task (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="new images a step and rank (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/horovod_rehearsal.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "out/train_horovod", help="folder of the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """One rank's part where `horovodrun` started this process, else starts it; returns the exit status."""
    arguments = parse(argv)
    if "HOROVOD_RANK" not in os.environ:
        return launch(arguments, argv)
    run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
