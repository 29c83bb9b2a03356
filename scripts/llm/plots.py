"""Pictures of the recipe: English during the phases, shares of the gap against the ratio, and old against new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.llm.plan import BASE, BUDGET, JOINT, RISING
from scripts.llm.results import LITERATURE, Row, gap_closed, losses, select

__all__ = ["plot_llm", "plot_old_against_new"]


def plot_llm(rows: Sequence[Row], path: Path) -> None:
    """Draws the first seed's held-out loss on English and the shares of the gap of all; writes it to `path`."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    english, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    _against_steps(english, select(rows, seed=0))
    _against_ratio(shares, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_old_against_new(rows: Sequence[Row], path: Path) -> None:
    """Draws the loss on English against that on French after French: fixed ratios as a line, other ways as points."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    panel = figure.subplots()
    base = select(rows, variant=BASE, after="french")
    fixed = sorted({row["arm"] for row in base} - {JOINT}, key=float)
    ends = [_ends(base, arm) for arm in fixed]
    panel.plot([end[0] for end in ends], [end[2] for end in ends], "-", color="0.5", zorder=0)
    for arm, end in zip(fixed, ends, strict=True):
        _point(panel, end, "o", "0.4", "a fixed ratio" if arm == fixed[0] else None)
        panel.annotate(f"{arm} %", (end[0], end[2]), (5, 5), textcoords="offset points", fontsize=8, color="0.3")
    for arm, colour in (("5", "tab:blue"), ("25", "tab:cyan")):
        if select(rows, variant=RISING, arm=arm, after="french"):
            end = _ends(select(rows, variant=RISING, after="french"), arm)
            _point(panel, end, "D", colour, f"{arm} % in the mean, rising, counts fourfold")
    if select(rows, variant=BUDGET, arm="budget"):
        _point(panel, _ends(select(rows, variant=BUDGET), "budget"), "s", "tab:orange", BUDGET)
    if select(base, arm=JOINT):
        _point(panel, _ends(base, JOINT), "*", "tab:red", "the union")
    panel.set(xlabel="held-out loss on French", ylabel="held-out loss on English")
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _ends(rows: Sequence[Row], arm: str) -> tuple[float, float, float, float]:
    """Mean and deviation of the loss on French, then of that on English."""
    new, old = losses(rows, arm, "french", "french"), losses(rows, arm, "french", "english")
    assert new is not None  # as the caller has looked
    assert old is not None
    return new.mean, new.deviation or 0.0, old.mean, old.deviation or 0.0


def _point(panel: Axes, end: tuple[float, float, float, float], marker: str, colour: str, label: str | None) -> None:
    panel.errorbar(end[0], end[2], end[3], end[1], marker=marker, color=colour, capsize=3, linestyle="", label=label)


def _against_steps(panel: Axes, rows: Sequence[Row]) -> None:
    """The course of English, phase behind phase; the union as the level that it ends at."""
    starts = {"english": 0}
    arms = sorted({row["arm"] for row in rows} - {"english", JOINT}, key=float)
    colours = dict(zip(arms, colormaps["viridis"].resampled(max(2, len(arms)))(range(len(arms))), strict=True))
    for row in select(rows, arm="english"):
        _curve(panel, row, 0, None, "0.4", "English")
        starts["french"] = row["steps"]
    for row in rows:
        if row["arm"] in arms and row["after"] == "french":
            _curve(panel, row, starts["french"], select(rows, arm="english"), colours[row["arm"]], f"{row['arm']} %")
            starts["german"] = starts["french"] + row["steps"]
    for row in rows:
        if row["arm"] in arms and row["after"] == "german":
            before = select(rows, arm=row["arm"], after="french")
            _curve(panel, row, starts["german"], before, colours[row["arm"]], None)
    for row in select(rows, arm=JOINT, after="french"):
        panel.axhline(row["curve"][-1]["english"], color="tab:red", linestyle="--", linewidth=1, label="union")
    begun = {row["after"] for row in rows if row["arm"] != JOINT}
    for language, start in starts.items():
        if language not in begun:
            continue
        panel.axvline(start, color="0.8", linewidth=1, zorder=0)
        panel.text(start, 1.01, f" {language.capitalize()}", transform=panel.get_xaxis_transform(), color="0.4")
    panel.set(xlabel="optimizer steps", ylabel="held-out loss on English (nats a token)")
    panel.legend(frameon=False, ncols=2)
    panel.spines[["top", "right"]].set_visible(False)


def _curve(panel: Axes, row: Row, start: int, before: Sequence[Row] | None, colour: object, label: str | None) -> None:
    """One phase, joined to the end of the one before it."""
    joined = [(start, one["curve"][-1]["english"]) for one in before or ()]
    points = joined + [(start + evaluation["step"], evaluation["english"]) for evaluation in row["curve"]]
    panel.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, color=colour, label=label)


def _against_ratio(panel: Axes, rows: Sequence[Row]) -> None:
    """Shares of the gap on English after French, and those of the literature."""
    arms = sorted({row["arm"] for row in rows} - {"english", JOINT, "0"}, key=float)
    shares = {arm: share for arm in arms if (share := gap_closed(rows, arm)) is not None}
    places = list(range(len(shares)))
    means = [100 * share.mean for share in shares.values()]
    bars = [100 * (share.deviation or 0.0) for share in shares.values()]
    panel.errorbar(places, means, bars, marker="o", markersize=4, capsize=3, label="here, after French")
    known = [(place, 100 * LITERATURE[arm]) for place, arm in zip(places, shares, strict=True) if arm in LITERATURE]
    if known:
        panel.plot(*zip(*known, strict=True), "s--", color="0.5", markersize=4, label="405 M parameters, literature")
    panel.set(xlabel="replay, % of the rows", ylabel="share of the gap on English that is closed, %", xticks=places)
    panel.set_xticklabels(list(shares))
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
