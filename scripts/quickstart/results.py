"""Results of the quickstart: figures, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.quickstart.train import Course, Evaluation

__all__ = ["BOTH", "WITH", "WITHOUT", "plot", "summarise", "table"]

BOTH, WITHOUT, WITH = "both arms", "without rehearsal", "with rehearsal"


def summarise(course: Course) -> dict[str, float]:
    """The numbers of the report.

    `forgetting_removed` is the share of the rise of the Python loss in phase two that rehearsal took away, and
    `cost_on_new` the relative rise of the C++ loss that it cost.
    """
    before, without, with_ = course.final(1, BOTH), course.final(2, WITHOUT), course.final(2, WITH)
    forgotten = without.loss["python"] - before.loss["python"]
    times = {arm: np.array([pair[arm] for pair in course.pairs]) for arm in (WITHOUT, WITH)}
    quartiles = np.quantile(times[WITH] / times[WITHOUT], [0.25, 0.5, 0.75])
    return {
        "python_after_phase_one": before.loss["python"],
        "cpp_after_phase_one": before.loss["cpp"],
        "python_without": without.loss["python"],
        "cpp_without": without.loss["cpp"],
        "python_with": with_.loss["python"],
        "cpp_with": with_.loss["cpp"],
        "forgetting_removed": (without.loss["python"] - with_.loss["python"]) / forgotten,
        "cost_on_new": with_.loss["cpp"] / without.loss["cpp"] - 1,
        "step_time_ratio_q1": float(quartiles[0]),
        "step_time_ratio": float(quartiles[1]),
        "step_time_ratio_q3": float(quartiles[2]),
        "step_ms_without": 1e3 * float(np.median(times[WITHOUT])),
        "step_ms_with": 1e3 * float(np.median(times[WITH])),
    }


def table(summary: dict[str, float]) -> str:
    """The summary for a person."""
    states = {"after phase one": "after_phase_one", f"after phase two, {WITHOUT}": "without"}
    states[f"after phase two, {WITH}"] = "with"
    losses = [f"{name:36}{summary[f'python_{key}']:10.3f}{summary[f'cpp_{key}']:10.3f}" for name, key in states.items()]
    low, middle, high = (summary[f"step_time_ratio{end}"] for end in ("_q1", "", "_q3"))
    return "\n".join(
        [
            f"{'held-out loss, nats per byte':36}{'Python':>10}{'C++':>10}",
            *losses,
            f"{'forgetting of Python removed':36}{summary['forgetting_removed']:10.1%}",
            f"{'cost on C++':36}{summary['cost_on_new']:20.2%}",
            f"{'step time':36}{summary['step_ms_without']:7.0f} ms without, {summary['step_ms_with']:.0f} ms with",
            f"{'ratio of step times':36}{middle:10.3f} (quartiles {low:.3f} to {high:.3f})",
        ]
    )


def plot(course: Course, path: Path) -> None:
    """Draws held-out loss against steps, one panel a domain, and writes it to `path`."""
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, domain, name in zip(panels, course.corpora, ("Python", "C++"), strict=True):
        learnt = [point for point in course.evaluations if point.phase == 1]
        panel.plot(*_curve(learnt, domain, course.steps), "o-", color="0.45", markersize=3.5, label="phase one")
        for arm, colour in ((WITHOUT, "tab:red"), (WITH, "tab:blue")):
            points = [learnt[-1], *(point for point in course.evaluations if (point.phase, point.arm) == (2, arm))]
            panel.plot(*_curve(points, domain, course.steps), "o-", color=colour, markersize=3.5, label=arm)
        _mark_phases(panel, course.steps)
        panel.set(title=f"held-out {name}", xlabel="optimizer steps", ylabel="loss (nats per byte)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _mark_phases(panel: Axes, steps: int) -> None:
    """A line where the phases meet, and over each what it trains on."""
    panel.axvline(steps, color="0.7", linestyle="--", linewidth=1, zorder=0)
    for middle, text in ((steps / 2, "trains on Python"), (1.5 * steps, "trains on C++")):
        panel.text(middle, 0.97, text, transform=panel.get_xaxis_transform(), ha="center", va="top", color="0.45")
    panel.set_xlim(0, 2.05 * steps)
    panel.margins(y=0.15)
    panel.spines[["top", "right"]].set_visible(False)


def _curve(points: Sequence[Evaluation], domain: str, phase_steps: int) -> tuple[list[int], list[float]]:
    """Steps since the start of phase one, and losses."""
    return [point.step + phase_steps * (point.phase - 1) for point in points], [point.loss[domain] for point in points]
