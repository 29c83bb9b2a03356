"""Builds `docs/results/growth.md` and its pictures from the report of `scripts.benchmarks.growth`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scripts.benchmarks.growth import DIMENSIONS, SEARCHED, SETTINGS, SMALLEST, exponent
from scripts.common.goals import Goal
from scripts.common.report import write_text
from scripts.common.tables import markdown_table

__all__ = ["build_growth"]

AXES = {
    "ranks": ("Ranks", "Ranks share the cores here, and talk over gloo: what a rank of its own would take is less."),
    "rows": ("Rows stored", f"Rows of {SMALLEST} bytes lie in a file (`storage: mmap`)."),
    "row_bytes": (
        "Bytes of a row",
        "Eight rows come, and eight are replayed: their copies grow. At most 1 GiB of rows is stored.",
    ),
    "partitions": ("Partitions", "There is a row of each partition at least."),
    "candidates": ("Candidates of a step", "All rows of a batch are candidates."),
    "micro_batches": ("Micro-batches of a step", "Each has eight rows. They share the eight replayed ones."),
    "policy": ("Policies", "`herding` compares eight features of all rows of a partition: it has 20 rows here."),
    "pause_ms": (
        "Milliseconds between two steps",
        "The process sleeps in between, and a step makes the same calls. The *control* has nothing to do with "
        "rehearsal: it is a training step of two small layers, with the same pauses. What a processor did not do "
        "just now, it does more slowly. So behind a model a step pays what you see on the right, not what a tight loop "
        "pays.",
    ),
    "index": (
        "Index of embeddings",
        f"Half of the eight rows are the nearest to the eight new ones, out of {SEARCHED:,} with embeddings of "
        f"{DIMENSIONS} numbers (`sampling.weights: retrieved`). `none` draws all of them uniformly. In each step "
        "eight rows are looked for, and eight come into the index. Nearly all of that is in the background. `ivf` "
        "looks into 64 lists, which are 5 % of all; fewer `probes` cost less, and may find less.",
    ),
}
"""By quantity: its title, and what to know of it."""

LINES = {"training_us": "training thread", "background_us": "background", "control_us": "control"}

GOALS = (
    Goal("paid_ms_loop", "ms of the training thread in a plain loop, 8 + 2 rows of 16 KiB", 0.2, at_most=True),
    Goal("background_ms_loop", "ms of all other threads there", 0.8, at_most=True),
    Goal("retrieved_ms", f"ms of all threads that the nearest of {SEARCHED:,} rows add, at best", 1.0, at_most=True),
    Goal("exponent_max", "the largest exponent", 1.1, at_most=True),
)

HEAD = """\
# Growth

What makes a step dearer, and how fast? Each figure lets one quantity grow. The others stay at one rank, 10,000 rows
of 1 KiB, no partitions, and one micro-batch of eight rows in a step that replays eight.

What is counted is CPU time of a rank's process. Your training loop pays the *training thread*. The *background* runs
beside your model. Both are medians over blocks of steps. The *exponent* says how they grow together at the end: 0 is
not at all, 1 is in proportion.
"""


def build_growth(docs: Path) -> Path | None:
    """Write the page from `docs/results/bench_growth.json`; None where that is missing."""
    path = docs / "results" / "bench_growth.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text())
    place = report["environment"]
    given = {name: report["summary"][name] for name in SETTINGS if name in report["summary"]}
    options = "".join(f" --{name} {value:.0f}" for name, value in given.items())
    parts = [
        HEAD,
        f"`python -m scripts.benchmarks.growth{options}`; {place['cores']} cores, load {report['summary']['load']:g}, "
        f"torch {place['versions']['torch']}, commit {place['commit'][:12]}.\n",
    ]
    summary = report["summary"]
    lines = [goal.line(summary[goal.key]) for goal in GOALS if goal.key in summary]
    parts += [markdown_table(["goal", "bound", "measured", ""], lines)] if lines else []
    for axis, (title, text) in AXES.items():
        rows = [row for row in report["rows"] if row["axis"] == axis]
        if rows:
            parts += [f"## {title}\n", f"{text}{_growing(axis, rows)}\n", *_shown(axis, title, rows, docs)]
    return write_text(docs / "results" / "growth.md", "\n".join(parts))


def _growing(axis: str, rows: Sequence[dict[str, Any]]) -> str:
    if isinstance(rows[0][axis], str) or axis == "pause_ms":
        return ""
    costs = [row["training_us"] + row["background_us"] for row in rows]
    return f" The exponent is {exponent([row[axis] for row in rows], costs):.2f}."


def _shown(axis: str, title: str, rows: Sequence[dict[str, Any]], docs: Path) -> list[str]:
    """The figure, and the table behind it."""
    picture = Path("images") / f"growth_{axis}.png"
    _plot(axis, title, rows, docs / picture)
    lines_of = _lines_of(rows)
    heads = [title.lower(), *(f"{label}, µs" for label in lines_of.values())]
    lines = [[_text(row[axis]), *(f"{row[name]:,.0f}" for name in lines_of)] for row in rows]
    return [f"![{title}](../{picture})\n", markdown_table(heads, lines)]


def _lines_of(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What there is to show, and what it is called."""
    return {name: label for name, label in LINES.items() if name in rows[0]}


def _plot(axis: str, title: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    panel = figure.subplots()
    values = [row[axis] for row in rows]
    named = isinstance(values[0], str)
    for name, label in _lines_of(rows).items():
        costs = [row[name] for row in rows]
        if named:
            panel.plot(values, costs, "o", label=label)
        else:
            panel.plot(values, costs, "o-", markersize=4, label=label)
    if not named:
        panel.set_xscale("log")
        panel.set_yscale("log")
    panel.set(xlabel=title.lower(), ylabel="µs of CPU a step", ylim=(0 if named else None, None))
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _text(value: object) -> str:
    return f"`{value}`" if isinstance(value, str) else f"{value:,}"
