"""The picture of scale: time of the background on clusters, in all and of headers, draw, copies and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["STEPS_MS", "plot_scale"]

PARTS = {"headers": "tab:blue", "draw": "tab:orange", "copies": "tab:green", "rows": "tab:red"}
STEPS_MS = (10, 100, 1000)


def plot_scale(rows: Sequence[Mapping[str, Any]], load: str, links: str, path: Path) -> None:
    """Draws the total of `load` over all links, and its parts over `links`, against GPUs; writes it to `path`."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    totals, parts = figure.subplots(1, 2)
    chosen = [row for row in rows if row["load"] == load]
    for name in dict.fromkeys(row["links"] for row in chosen):
        line = [row for row in chosen if row["links"] == name]
        totals.plot([row["gpus"] for row in line], [row["total"] for row in line], "o-", markersize=3, label=name)
    for step in STEPS_MS:
        totals.axhline(step, color="0.7", linestyle="--", linewidth=1, zorder=0)
        totals.text(8, step, f" a step of {step:,} ms hides what is below", color="0.4", va="bottom", fontsize=8)
    line = [row for row in chosen if row["links"] == links]
    for part, colour in PARTS.items():
        places, values = [row["gpus"] for row in line], [row[part] for row in line]
        parts.plot(places, values, "o-", markersize=3, color=colour, label=part)
    totals.set_title("in all", fontsize=10)
    parts.set_title(f"of which, {links}", fontsize=10)
    for panel in (totals, parts):
        _finish(panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _finish(panel: Axes) -> None:
    panel.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="background of a step, ms (model)")
    panel.set_xscale("log", base=2)
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
