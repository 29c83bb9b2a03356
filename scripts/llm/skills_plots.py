"""The picture of the recipe of skills: right answers in the course of French, a line an arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.llm.results import Row, select
from scripts.llm.skills_plan import ADAPTERS, FULL
from scripts.llm.skills_results import arms_of, in_full

__all__ = ["plot_skills"]

LOOKS = {
    "no replay": ("#000000", "o"),
    "1 %": ("#E69F00", "v"),
    "5 %": ("#0072B2", "s"),
    "10 %": ("#009E73", "^"),
    "5 %, made up": ("#CC79A7", "D"),
    "budget": ("#D55E00", "P"),
}
"""Colour, out of the set of Okabe and Ito, which the colour-blind can tell apart, and marker of every arm."""

MARKERS = (10.0, 9.0, 8.0, 7.0, 6.0, 5.0)
"""Sizes of the markers: lines that coincide show as rings."""


def plot_skills(rows: Sequence[Row], path: Path) -> None:
    """Draws mean and range over the seeds, a panel for all parameters and one for LoRA; writes it to `path`."""
    rows = in_full(rows)
    panels = [trained for trained in (FULL, ADAPTERS) if any(one == trained for one, _ in arms_of(rows))]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, trained in zip(axes, panels, strict=True):
        _draw(panel, select(rows, learns="french", trained=trained))
        panel.set_title(f"French with {trained}", fontsize=11)
        panel.set_xlabel("step of the training in French")
    axes[0].set_ylabel("right answers to held-out\nprompts of the skill, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="replay", loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(panel: Axes, rows: Sequence[Row]) -> None:
    """One panel: a line an arm, and a band from the worst seed to the best."""
    for size, arm in zip(MARKERS, dict.fromkeys(row["arm"] for row in rows), strict=False):
        colour, marker = LOOKS[arm]
        curves = [row["curve"] for row in select(rows, arm=arm)]
        steps = [point["step"] for point in curves[0]]
        skills = 100 * np.array([[point["skill"] for point in curve] for curve in curves])
        label = "none" if arm == "no replay" else arm
        panel.plot(steps, skills.mean(0), color=colour, marker=marker, markersize=size, linewidth=1.8, label=label)
        panel.fill_between(steps, skills.min(0), skills.max(0), color=colour, alpha=0.2, linewidth=0)
    panel.set_ylim(-4, 104)
    panel.grid(axis="y", color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
