"""The plots of a report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rehearsal_plugin.cli.runs.run import Run, Series
from rehearsal_plugin.core.optional_import import optional_import

__all__ = ["draw_plots"]

SIZE_INCHES = (9.0, 3.2)
QUARTILES = {"age_0": "youngest", "age_1": "first quartile", "age_2": "median", "age_3": "third", "age_4": "oldest"}


def draw_plots(run: Run) -> Iterator[tuple[str, str]]:
    """Title and SVG of each plot that the run has numbers for.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    for title, lines in _plots_of(run):
        drawn = {label: series for label, series in lines.items() if series}
        if drawn:
            yield title, _draw_lines(drawn, run)


def _plots_of(run: Run) -> Iterator[tuple[str, dict[str, Series]]]:
    yield "Share of replayed rows", {"met": run.share_met(), "asked for": run.series("ratio")}
    for name, meaning in (("loss_new", "Loss on new rows"), ("loss_replayed", "Loss on replayed rows")):
        yield f"{meaning}, by domain", _by_partition(run, name)
    yield "Stored rows, by domain", _by_partition(run, "rows_stored")
    yield "Replayed rows, by domain", _by_partition(run, "rows_replayed")
    yield "Ages of stored rows in steps", {label: run.series(name) for name, label in QUARTILES.items()}
    yield "Median age of stored rows, by domain", _by_partition(run, "age")
    waits = {"waited for the background": "waited_ms", "augmented batches": "augmented_ms"}
    yield "Milliseconds a step on the training thread", {label: run.ms_per_step(name) for label, name in waits.items()}


def _by_partition(run: Run, name: str) -> dict[str, Series]:
    lines = {f"domain {key}": run.series(f"{name}/{key}") for key in run.partitions(name)}
    return {"all": run.series(name), **lines}


def _draw_lines(lines: dict[str, Series], run: Run) -> str:
    """One plot, with a dashed line at each event of the guard."""
    optional_import("matplotlib", extra="plot", needed_by="rehearsal report")
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    for label, series in lines.items():
        axes.plot(*zip(*series, strict=True), label=label, marker="." if len(series) < 3 else "")
    for event in run.events():
        axes.axvline(event.step, color="#b91c1c", linestyle="--", linewidth=0.8)
    axes.set_xlabel(run.counts)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]  # the page has its own head
