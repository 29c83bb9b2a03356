"""The curves of a study: against the size of the buffer, and against the tasks trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.common.spread import Spread
from scripts.studies.arms import INCREMENTAL, REPLAYING, SCRATCH
from scripts.studies.results import Group, Metric, find_group

__all__ = ["plot_study"]

COLOURS = dict(
    zip((SCRATCH, INCREMENTAL, *REPLAYING), ("0.2", "0.6", "tab:blue", "tab:orange", "tab:green"), strict=True)
)


def plot_study(groups: Sequence[Group], metric: Metric, title: str, path: Path) -> None:
    """Draws value and forgetting against the buffer, and the way there with the largest one; writes it to `path`.

    Bars and shades are one standard deviation over seeds to each side.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    figure.suptitle(title)
    value, forgetting, way = figure.subplots(1, 3)
    _against_buffer(value, groups, "average")
    value.set(title="after the last task", ylabel=f"{metric.label}, mean over tasks")
    _against_buffer(forgetting, groups, "forgetting")
    forgetting.set(title="forgetting", ylabel=f"loss of {metric.label}" if metric.higher_is_better else "rise")
    _against_tasks(way, groups)
    way.set(ylabel=f"{metric.label}, mean over tasks so far")
    figure.legend(*value.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _against_buffer(panel: Axes, groups: Sequence[Group], name: str) -> None:
    """A line for every method with a buffer, a band for every one without."""
    sizes = sorted({one.arm.buffer_percent for one in groups} - {0.0})
    for method in (SCRATCH, INCREMENTAL):
        level: Spread | None = getattr(find_group(groups, method), name)
        if level is not None:
            panel.axhline(level.mean, color=COLOURS[method], linestyle="--", label=method)
            _shade(panel, sizes, [level] * len(sizes), method)
    trained = {one.arm.method for one in groups}
    for method in (one for one in REPLAYING if one in trained):
        values = [getattr(find_group(groups, method, size), name) for size in sizes]
        means, bars = [one.mean for one in values], [one.deviation or 0.0 for one in values]
        panel.errorbar(sizes, means, bars, marker="o", markersize=4, capsize=3, color=COLOURS[method], label=method)
    panel.set(xlabel="buffer, % of the training data", xscale="log", xticks=sizes)
    panel.set_xticklabels([f"{size:g}" for size in sizes])
    panel.minorticks_off()
    _tidy(panel)


def _against_tasks(panel: Axes, groups: Sequence[Group]) -> None:
    largest = max(one.arm.buffer_percent for one in groups)
    for one in groups:
        if one.arm.buffer_percent in (0.0, largest):
            method, tasks, spreads = one.arm.method, list(one.curve), list(one.curve.values())
            panel.plot(tasks, [s.mean for s in spreads], "o-", markersize=4, color=COLOURS[method], label=method)
            _shade(panel, tasks, spreads, method)
    panel.set(title=f"buffer {largest:g} %", xlabel="tasks trained")
    _tidy(panel)


def _shade(panel: Axes, places: Sequence[float], spreads: Sequence[Spread], method: str) -> None:
    means = np.array([one.mean for one in spreads])
    bars = np.array([one.deviation or 0.0 for one in spreads])
    panel.fill_between(places, means - bars, means + bars, color=COLOURS[method], alpha=0.15, linewidth=0)


def _tidy(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
