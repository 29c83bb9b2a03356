"""Builds `docs/results/study.md` and its pictures from the reports of both studies.

    python -m scripts.studies.page

Every number on the page comes out of `out/study_classification/report.json` or `out/study_ptychography/report.json`;
the words around them are here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from scripts.common.goals import Goal
from scripts.common.paths import ROOT
from scripts.common.report import write_text
from scripts.common.tables import markdown_table
from scripts.studies.arms import METHODS, Row
from scripts.studies.plots import plot_study
from scripts.studies.results import NOT_LEARNT, Metric, group_seeds, table_cells

__all__ = ["STUDIES", "Study", "build"]

MOST_TASKS = 8
"""A table has a column for each task up to here."""

KNOBS = {
    "lr": "learning rate",
    "loss_weight": "loss weight",
    "alpha": "alpha",
    "beta": "beta",
    "representatives": "r",
}
"""Fields of a row that say how a method was set, and what the page calls them."""

Report: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """One study and what the page says of it.

    Attributes:
        name: Of the script, `scripts.studies.<name>`, and of the folder of its report, `study_<name>`.
        title: Of its section.
        text: Method of the study.
        metrics: Values of each task in its rows.
        goals: Bounds on figures of its summary.
    """

    name: str
    title: str
    text: str
    metrics: tuple[Metric, ...]
    goals: tuple[Goal, ...]

    @property
    def folder(self) -> str:
        """The folder of its report below `out`; its pictures begin with the same name."""
        return f"study_{self.name}"

    @property
    def command(self) -> str:
        """The command that makes its report."""
        return f"python -m scripts.studies.{self.name} --size full"


HEAD = """\
# What rehearsal keeps, and what it costs

Which method keeps most, and how large has your buffer to be? Two studies answer, each of real components on two ranks
that share one buffer:

- *From scratch* trains on all tasks at once, shuffled, in as many steps and with as many rows a step as rehearsal
  takes. It is the upper bound.
- *Incremental* trains on one task after the other and keeps nothing. It is the lower bound.
- `er`, `der` and `der++` see the same tasks with a buffer.

The size of the buffer is that of all ranks together, in percent of the training data. With the policy `reservoir`,
every row offered so far has the same chance to be in it. So k tasks of one size share it in k equal parts, whatever
their order.

All methods replay the same number of rows a step, r. `der++` takes two draws of r / 2. *Forgetting* is how far a task
fell from its best value after its own training to its last one, averaged over the tasks. Numbers are means with one
standard deviation over the seeds. *s* is training time without evaluation, on a machine that may have done other
things as well. *MiB* is what the stored rows of all ranks take.
"""

CLASSIFICATION = Study(
    "classification",
    "Images: new classes come, old ones do not return",
    """\
Ten classes come in five tasks of two. A network of residual blocks with group norms (78,000 parameters) is trained
with SGD (momentum 0.9) under DistributedDataParallel on gloo. Each rank takes 32 new images a step and sees every
image once. It answers among all ten classes, without being told the task. A stored row is the image as bytes and its
label. `der` and `der++` store the ten scores beside them.

The learning rate is constant and falls to zero over the last tenth of all steps. It was chosen for training from
scratch, and the weights in the losses for each method, with `--size choose`. That is on a tenth of the training
images that was held out, with a seed that is not reported, with buffers of 2.5 and 30 %. They are the same for all
sizes of the buffer. The test images chose nothing.

The time ratio is that of two trainings that take turns in one process, 20 steps each. One is `er` with a buffer of 30
%, the other plain training with b + r new images a step. It is the median over the pairs.
""",
    (Metric("accuracy", "accuracy", higher_is_better=True),),
    (
        Goal("er_ratio_30", "accuracy of `er` with a buffer of 30 %, as a share of that from scratch", 0.95),
        Goal("er_time_ratio", "time of a step of `er` against plain training with as many rows", 1.15, at_most=True),
        Goal("derpp_minus_er_smallest", "accuracy of `der++` less that of `er`, smallest buffer", 0.0),
    ),
)

PTYCHOGRAPHY = Study(
    "ptychography",
    "Ptychography: scans drift while they are learnt from",
    """\
A network with one encoder and two decoders learns to see amplitude and phase of an object in its diffraction
patterns. The scans are simulated, and focus, photons or texture drift from task to task. Patterns arrive while
training goes on. A stored row is a pattern with both images. `der` and `der++` store what both decoders said beside
them. Errors are mean absolute errors on patterns that were not trained on. Nothing is replayed during the first task.

All methods have one learning rate. The weights in the losses are those that did best with `--size choose`: on the
drift of photons, with a buffer of 10 % and a seed that is not reported.

Hold the errors against an answer that does not look at the pattern. The median of a task is off by 0.13 in amplitude
and by 0.27 rad in phase. So 80 steps learn little of the phase: on the drift of photons training from scratch itself
is a tenth better than the median. What a method forgets there says little. New reports have this answer for every
task, and say *not learnt* where a method makes good less than a tenth of its error.
""",
    (
        Metric("amplitude_error", "amplitude error", higher_is_better=False, digits=4),
        Metric("phase_error", "phase error (rad)", higher_is_better=False, digits=4),
    ),
    (
        Goal(
            "forgetting_reduction_amplitude",
            "share of the forgetting of amplitude that `er` removes, least drift",
            0.0,
            above=True,
        ),
        Goal("forgetting_reduction_phase", "the same of the phase", 0.0, above=True),
    ),
)

STUDIES = (CLASSIFICATION, PTYCHOGRAPHY)


def main(argv: Sequence[str]) -> int:
    """Builds the page from the reports; returns the exit status."""
    parser = argparse.ArgumentParser(description="The page of both studies from their reports.")
    parser.add_argument("--reports", type=Path, default=ROOT / "out", help="folder of the studies' folders")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    arguments = parser.parse_args(argv)
    try:
        print(build(arguments.reports, arguments.docs))
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 1
    return 0


def build(reports: Path, docs: Path) -> Path:
    """Writes the page and its pictures into `docs`.

    Raises:
        FileNotFoundError: A study has no report yet; the message says how to make it.
    """
    loaded = [(study, load(reports / study.folder / "report.json", study)) for study in STUDIES]
    sections = [section(study, report, docs) for study, report in loaded]
    return write_text(docs / "results" / "study.md", "\n".join([HEAD, *sections]))


def load(path: Path, study: Study) -> Report:
    """A study's report."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; make it with: {study.command}")
    report: Report = json.loads(path.read_text())
    return report


def section(study: Study, report: Report, docs: Path) -> str:
    """The part of the page about one study."""
    summary, rows = report["summary"], report["rows"]
    parts = [f"## {study.title}", study.text, environment(study, report)]
    lines = [
        goal.line(summary[goal.key], quartiles(summary, goal.key))
        if goal.key in summary
        else [f"`{goal.key}`: {goal.meaning}", "", NOT_LEARNT, ""]
        for goal in study.goals
    ]
    parts.append(markdown_table(["goal", "bound", "measured", ""], lines))
    drifts = list(dict.fromkeys(line.get("drift") for line in rows if line["table"] == "buffers"))
    for drift in drifts:
        of_drift = [line for line in rows if line.get("drift") == drift]
        parts += [part for metric in study.metrics for part in results(study, metric, of_drift, drift, docs)]
    parts += knobs(rows)
    return "\n".join(parts)


def quartiles(summary: Report, key: str) -> str:
    """Quartiles of a figure in brackets; empty where it has none."""
    low, high = (summary.get(f"{key}_{name}") for name in ("q1", "q3"))
    return "" if low is None or high is None else f" (quartiles {low:.3f} to {high:.3f})"


def results(study: Study, metric: Metric, rows: Sequence[Row], drift: str | None, docs: Path) -> list[str]:
    """Picture and tables of one metric."""
    title = metric.label.capitalize() + (f", drift of {drift}" if drift else "")
    picture = Path("images") / f"{'_'.join(filter(None, [study.folder, drift, metric.name]))}.png"
    groups, draws = group_seeds(rows, metric), group_seeds(rows, metric, "rows")
    plot_study(groups, metric, title, docs / picture)
    parts = [f"### {title}", "", f"![{title}](../{picture})", ""]
    parts.append(markdown_table(*table_cells(groups, tasks=len(groups[0].tasks) <= MOST_TASKS, digits=metric.digits)))
    if draws:
        parts.append(f"{title}, with r rows replayed and c rows offered to the buffer a step and rank; one seed:\n")
        parts.append(markdown_table(*table_cells(draws, tasks=False, digits=metric.digits)))
    return parts


def knobs(rows: Iterable[Row]) -> list[str]:
    """The settings of every method, where the rows tell them."""
    lines = {line["method"]: line for line in rows if line["table"] == "buffers" and "lr" in line}
    if not lines:
        return []
    names = [name for name in KNOBS if all(name in line for line in lines.values())]
    table = [[method, *(f"{lines[method][name]:g}" for name in names)] for method in METHODS]
    return ["The settings:\n", markdown_table(["method", *(KNOBS[name] for name in names)], table)]


def environment(study: Study, report: Report) -> str:
    """The command, and where it ran."""
    summary, place = report["summary"], report["environment"]
    done = ", ".join(
        f"{name.replace('_', ' ')}: {summary[name]:g}" for name in ("steps_a_task", "seeds") if name in summary
    )
    return (
        f"`{study.command}`; {done or 'see the script'}; {place['ranks']} ranks on "
        f"{place['cores']} cores, torch {place['versions']['torch']}, commit {place['commit'][:12]}.\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
