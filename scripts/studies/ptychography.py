"""How much rehearsal keeps of scans seen long ago: diffraction patterns whose conditions drift while they arrive.

    python -m scripts.studies.ptychography --size small
    python -m scripts.studies.ptychography --size full

starts itself on two ranks. Beside each rank a process simulates scans and feeds a bounded queue; the rank trains on
what has arrived. There are three streams: defocus, photons or texture move from task to task. Training from scratch
on all tasks mixed bounds from above, training as they come from below; between them er, der and der++, each with
several seeds, and on the first stream with buffers of several sizes. Writes `report.json` and a picture for each
stream and error to `out/study_ptychography`; `--resume` goes on with an interrupted study.

The learning rate and the weights in the losses come from `--size choose`, which tries them on one drift with a seed
that the study does not report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scripts.common.launch import is_rank, launch
from scripts.common.report import write_report
from scripts.common.tables import print_table
from scripts.studies.arms import Row
from scripts.studies.command import publish_choice, study_parser
from scripts.studies.knobs import CHOOSE
from scripts.studies.ptychography_plan import METRICS, SIZES, Size, chosen, of_drift, reduction_of, summarise
from scripts.studies.results import NOT_LEARNT, group_seeds, table_cells


def main(argv: Sequence[str]) -> int:
    """Runs one rank where a launcher started this process, else starts the launcher; returns the exit status."""
    arguments = parse(argv)
    if not is_rank():
        return launch("scripts.studies.ptychography", arguments.ranks, argv)
    run(arguments)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    description = "Rehearsal on drifting diffraction scans, against both bounds."
    parser = study_parser("ptychography", description, SIZES)
    parser.add_argument("--steps", type=int, help="optimizer steps a task, for a quick look")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """One rank's part, from the first scan to the results; the processes that only simulate need no torch."""
    import torch.distributed as dist

    from scripts.common.process_group import leave_together
    from scripts.studies.ptychography_train import train_arms

    dist.init_process_group("gloo")
    choosing, size = arguments.size == CHOOSE, SIZES[arguments.size]
    if arguments.steps is not None:
        size = replace(size, course=replace(size.course, steps=arguments.steps))
    jobs = size.choices() if choosing else size.jobs()
    folder, ranks = arguments.out / CHOOSE if choosing else arguments.out, dist.get_world_size()
    rows = train_arms(jobs, size, folder / "arms", resume=arguments.resume)
    if dist.get_rank() == 0 and choosing:
        title = f"Sum of both errors, drift of photons, seed {size.seeds[0]}"
        publish_choice(folder, rows, chosen(rows), figure="error", title=title, ranks=ranks)
    elif dist.get_rank() == 0:
        publish(rows, size, folder, ranks)
    leave_together()


def publish(rows: list[Row], size: Size, folder: Path, ranks: int) -> None:
    """Writes report and pictures, prints the tables."""
    from scripts.studies.plots import plot_study

    summary = summarise(rows) | {"steps_a_task": size.course.steps, "seeds": len(size.seeds)}
    report = write_report(folder, summary, rows, ranks=ranks)
    for drift in size.buffers:
        for metric in METRICS:
            groups, title = group_seeds(of_drift(rows, drift), metric), f"{metric.label}, drift of {drift}"
            plot_study(groups, metric, title, folder / f"{drift}_{metric.name}.png")
            print_table(f"{title}, after the last task", *table_cells(groups, tasks=False, digits=4))
            if draws := group_seeds(of_drift(rows, drift), metric, "rows"):
                print_table(f"{title}, er with other r and c", *table_cells(draws, tasks=False, digits=4))
    for name, value in summary.items():
        print(f"{name:48}{value:10.4g}")
    for metric in METRICS:
        if reduction_of(metric) not in summary:
            print(f"{reduction_of(metric):48}{NOT_LEARNT}")
    print(report, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
