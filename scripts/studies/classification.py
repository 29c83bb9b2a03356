"""How much rehearsal keeps of images seen long ago: class-incremental Fashion-MNIST, five tasks of two classes.

    python -m scripts.studies.classification --size small
    python -m scripts.studies.classification --size full

starts itself on two ranks. Training from scratch on everything bounds from above, training on one task after the
other from below; between them er, der and der++ with buffers of several sizes, each with several seeds. Then er
with other r and c, and its time against plain training with as many rows a step. Writes `report.json` and
`study.png` to `out/study_classification`; `--resume` goes on with an interrupted study.

The learning rate and the weights in the losses are what did best in `--size choose`, which tries them on held-out
training images with a seed that the study does not use; the test images choose nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from scripts.common.image_data import ImageData, load_images
from scripts.common.launch import is_rank, launch
from scripts.common.process_group import leave_together
from scripts.common.report import write_report
from scripts.common.tables import print_table
from scripts.studies.arms import DERPP, ER, SCRATCH, Arm, Row
from scripts.studies.classification_plan import ACCURACY, KNOBS, SIZES, Size, chosen
from scripts.studies.classification_time import SEGMENT, summarise_times, time_in_turns
from scripts.studies.classification_train import TASKS, Course, hold_out, train
from scripts.studies.command import publish_choice, study_parser
from scripts.studies.knobs import CHOOSE, Knobs
from scripts.studies.plots import plot_study
from scripts.studies.results import find_group, group_seeds, table_cells
from scripts.studies.run_arms import ArmResults, Job, progress_of, train_all


def main(argv: Sequence[str]) -> int:
    """Runs one rank where a launcher started this process, else starts the launcher; returns the exit status."""
    arguments = parse(argv)
    if is_rank():
        run(arguments)
        return 0
    load_images()  # so that the ranks find them in the cache
    return launch("scripts.studies.classification", arguments.ranks, argv)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    description = "Rehearsal on class-incremental images, against both bounds."
    return study_parser("classification", description, SIZES).parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """One rank's part, from the images to the results."""
    dist.init_process_group("gloo")
    choosing, size = arguments.size == CHOOSE, SIZES[arguments.size]
    images = hold_out(load_images()) if choosing else first_test_images(load_images(), size.test_images)
    course = Course(images, size.steps, size.batch, size.representatives, dist.get_rank(), dist.get_world_size())
    jobs = size.choices() if choosing else size.jobs()
    steps = len(jobs) * TASKS * size.steps + (2 * SEGMENT * (size.pairs + 1) if size.pairs else 0)
    with progress_of(steps) as progress:
        plans = [planned(job, course, arguments.out / "arms", progress) for job in jobs]
        rows = train_all(plans, describe_result, progress, resume=arguments.resume)
        times = time_in_turns(course, KNOBS[ER], size.pairs, progress) if size.pairs else []
    if course.rank == 0 and choosing:
        title = "Accuracy on held-out training images"
        publish_choice(arguments.out / CHOOSE, rows, chosen(rows), figure="accuracy", title=title, ranks=course.ranks)
    elif course.rank == 0:
        publish(rows, times, size, images.name, arguments.out)
    leave_together()


def first_test_images(images: ImageData, count: int) -> ImageData:
    """The same training images, fewer to test on."""
    return replace(images, test_images=images.test_images[:count], test_labels=images.test_labels[:count])


def planned(job: tuple[Arm, Knobs], course: Course, folder: Path, progress: tqdm[Any]) -> Job:
    """An arm as a job of `train_all`."""
    arm, knobs = job
    settings = {"steps": course.steps, "batch": course.batch, "ranks": course.ranks, "data": course.images.name}
    settings["rows_a_step"] = course.batch + course.representatives  # of the upper bound
    settings["test_images"] = len(course.images.test_labels)
    return Job(arm.name, arm, ArmResults(folder, settings | asdict(knobs)), lambda: train(arm, knobs, course, progress))


def describe_result(rows: Sequence[Row]) -> str:
    """One arm's result on a line."""
    (one,) = group_seeds(rows, ACCURACY, rows[0]["table"])
    return f"accuracy {one.average.text()}, {one.seconds.text(1)} s"


def summarise(rows: Sequence[Row], times: Sequence[Row]) -> dict[str, float]:
    """Figures of the study: accuracy of er against the upper bound, gain of der++ over er, cost of er."""
    groups = group_seeds(rows, ACCURACY)
    sizes = sorted({one.arm.buffer_percent for one in groups} - {0.0})
    smallest, largest = sizes[0], sizes[-1]
    top = find_group(groups, SCRATCH).average.mean
    return {
        f"er_ratio_{largest:g}": find_group(groups, ER, largest).average.mean / top,
        "derpp_minus_er_smallest": find_group(groups, DERPP, smallest).average.mean
        - find_group(groups, ER, smallest).average.mean,
        **summarise_times(times),
    }


def publish(rows: list[Row], times: list[Row], size: Size, data: str, folder: Path) -> None:
    """Writes report and picture, prints the tables."""
    summary = summarise(rows, times) | {"steps_a_task": size.steps, "seeds": len(size.seeds)}
    report = write_report(
        folder, summary, [{"data": data, **line} for line in rows + times], ranks=dist.get_world_size()
    )
    groups = group_seeds(rows, ACCURACY)
    plot_study(groups, ACCURACY, f"{data}, class-incremental", folder / "study.png")
    print_table(f"Accuracy after the last task, {data}", *table_cells(groups, tasks=False))
    print_table("er with other r and c", *table_cells(group_seeds(rows, ACCURACY, "rows"), tasks=False))
    for name, value in summary.items():
        print(f"{name:28}{value:10.4g}")
    print(f"{report}\n{folder / 'study.png'}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
