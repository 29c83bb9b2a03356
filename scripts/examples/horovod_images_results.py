"""Results of the Horovod example: figures, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rehearsal_plugin.evaluation import Transfer
from scripts.common.report import write_report
from scripts.common.tables import print_table

__all__ = ["NAIVE", "REHEARSAL", "Arm", "publish", "show"]

NAIVE, REHEARSAL = "naive", "rehearsal"


@dataclass
class Arm:
    """One way of training, and what was measured of it.

    Attributes:
        name: `naive` or `rehearsal`.
        accuracies: after each task, the accuracy on each task's classes (all classes are possible answers).
        seconds: spent in training steps.
        ranks_identical: whether the parameters of all ranks agreed in every bit at the end.
    """

    name: str
    accuracies: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    ranks_identical: bool = False

    @property
    def final(self) -> float:
        """Accuracy over all classes after the last task; the tasks have equally many test images."""
        return float(np.mean(self.accuracies[-1]))

    @property
    def forgetting(self) -> float:
        """Mean over the earlier tasks of the best accuracy before the last task, less that after it."""
        transfer = Transfer(lower_is_better=False)
        for accuracies in self.accuracies:
            transfer.add(accuracies)
        return transfer.figures()["forgetting"]

    @property
    def learnt(self) -> float:
        """Mean accuracy of a task right after it was trained: low where an arm learns nothing to forget."""
        return float(np.mean(np.diag(np.array(self.accuracies))))

    def rows(self) -> list[dict[str, object]]:
        """The table of the report, one line for each task trained."""
        return [
            {"arm": self.name, "after_task": task, **{f"accuracy_task_{i}": a for i, a in enumerate(line, 1)}}
            for task, line in enumerate(self.accuracies, 1)
        ]


def publish(arms: Sequence[Arm], data: str, folder: Path, ranks: int) -> None:
    """Writes report and picture into `folder`."""
    summary = {"ranks_identical": float(all(arm.ranks_identical for arm in arms))}
    for arm in arms:
        measured = {"accuracy": arm.final, "learnt": arm.learnt, "forgetting": arm.forgetting}
        measured["train_s"] = arm.seconds
        summary |= {f"{name}_{arm.name}": value for name, value in measured.items()}
    rows = [{"data": data, **row} for arm in arms for row in arm.rows()]
    write_report(folder, summary, rows, ranks=ranks)
    plot(arms, data, folder / "accuracy.png")


def plot(arms: Sequence[Arm], data: str, path: Path) -> None:
    """Draws the accuracy on each task's classes against the tasks trained, one panel an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(arms), figsize=(10, 4), sharey=True, layout="constrained", squeeze=False)
    for panel, arm in zip(panels[0], arms, strict=True):
        history, trained = np.array(arm.accuracies), np.arange(1, len(arm.accuracies) + 1)
        for task in range(len(history)):
            panel.plot(trained[task:], history[task:, task], marker="o", markersize=3, label=f"task {task + 1}")
        panel.plot(trained, history.mean(axis=1), color="0.3", linestyle="--", label="all classes")
        panel.set(title=f"{data}, {arm.name}", xlabel="tasks trained", xticks=trained, ylim=(0, 1))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("accuracy on held-out images")
    panels[0, -1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def show(folder: Path) -> None:
    """Prints the report of `folder` as a table."""
    report = json.loads((folder / "report.json").read_text())
    summary, rows = report["summary"], report["rows"]
    tasks = [name for name in rows[0] if name.startswith("accuracy_task_")]
    heads = ["", *(str(number) for number in range(1, len(tasks) + 1)), "all", "learnt", "forgotten", "s"]
    title = f"Accuracy on the classes of each task at the end, {rows[0]['data']}"
    lines = []
    for arm in (NAIVE, REHEARSAL):
        last = [row for row in rows if row["arm"] == arm][-1]
        whole = [summary[f"{name}_{arm}"] for name in ("accuracy", "learnt", "forgetting")]
        cells = [f"{value:.3f}" for value in [*(last[name] for name in tasks), *whole]]
        lines.append([arm, *cells, f"{summary[f'train_s_{arm}']:.1f}"])
    print_table(title, heads, lines)
    same = "identical in every bit" if summary["ranks_identical"] else "NOT identical"
    print(f"parameters of the {report['environment']['ranks']} ranks: {same}\n{folder / 'report.json'}")
