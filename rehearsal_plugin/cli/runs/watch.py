"""`rehearsal watch`: a running job on a terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rehearsal_plugin.cli.runs.run import Run
from rehearsal_plugin.cli.runs.sources import read_run
from rehearsal_plugin.errors import DataError

__all__ = ["render", "watch"]

Option = typer.Option
BARS = "▁▂▃▄▅▆▇█"
LATEST, EVENTS = 24, 5
BY_PARTITION = ("rows_offered", "rows_stored", "rows_replayed", "loss_new", "loss_replayed")


def watch(
    run: Annotated[
        Path,
        typer.Argument(
            help="The file of rehearsal.metrics.file, a Trainer's output_dir, or the folder of DeepSpeed's csv_monitor."
        ),
    ],
    every: Annotated[float, Option(min=0.1, help="Seconds between two looks at the file.")] = 2.0,
    once: Annotated[bool, Option("--once", help="Show it once, and end.")] = False,
) -> None:
    """Show a running job: share met, losses and rows by domain, waits, the guard.

    Waits for the job to begin, and ends with it or by Ctrl-C. Without a terminal it is shown once.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    if once or not console.is_terminal:
        console.print(render(read_run(run)))
        return
    try:
        now = _first_look(run, every, console)
        with Live(render(now), console=console, auto_refresh=False) as live:
            while not now.ended:
                time.sleep(every)
                now = read_run(run)
                live.update(render(now), refresh=True)
    except KeyboardInterrupt:
        return


def _first_look(run: Path, every: float, console: Console) -> Run:
    """The run, as soon as there is something to read; until then, why not."""
    with console.status("") as waiting:
        while True:
            try:
                return read_run(run)
            except DataError as error:
                waiting.update(str(error))
                time.sleep(every)


def render(run: Run) -> RenderableType:
    """A run as it stands, for a terminal."""
    parts: list[RenderableType] = [_headline(run), _summary(run)]
    parts += [part for part in (_by_partition(run), _guard(run)) if part is not None]
    return Group(*parts)


def _headline(run: Run) -> Text:
    told = "" if run.last.time is None else f", told {max(0.0, time.time() - run.last.time):.0f} s ago"
    settings = ", ".join(f"{name} {value}" for name, value in run.section.items() if value is not None)
    return Text(f"{run.source}: {run.counts} {run.last.step}{' (ended)' if run.ended else told}\n{settings}".rstrip())


def _summary(run: Run) -> Table:
    table = Table("of rank 0", "now", "lately", title_justify="left")
    met, values = run.share_met(), run.last.values
    if (share := run.total_share()) is not None:
        asked = f", {values['ratio']:.4g} asked for" if "ratio" in values else ""
        lately = f"{met[-1][1]:.4g} lately, " if met else ""
        table.add_row("share of replayed rows", f"{lately}{share:.4g} in all{asked}", _spark([one for _, one in met]))
    for name, meaning in (("waited_ms", "waited, ms a step"), ("augmented_ms", "augmented, ms a step")):
        if series := run.ms_per_step(name):
            table.add_row(meaning, f"{series[-1][1]:.3g}", _spark([value for _, value in series]))
    for name, meaning in (("rows_stored", "rows stored"), ("rows_replayed", "rows replayed")):
        if name in values:
            table.add_row(meaning, f"{values[name]:,.0f}", "")
    if "age_2" in values:
        ages = " / ".join(f"{values[f'age_{place}']:.0f}" for place in range(5))
        table.add_row("ages of rows in steps, quartiles", ages, "")
    for name, meaning in (("loss_new", "loss on new rows"), ("loss_replayed", "loss on replayed rows")):
        if name in values:
            table.add_row(meaning, f"{values[name]:.4g}", _spark([value for _, value in run.series(name)]))
    return table


def _by_partition(run: Run) -> Table | None:
    keys = run.partitions(*BY_PARTITION)
    if not keys:
        return None
    table = Table("domain", "offered", "stored", "replayed", "median age", "loss, new", "loss, replayed", "lately")
    values = run.last.values
    for key in keys:
        cells = [_cell(values.get(f"{name}/{key}"), ",.0f") for name in BY_PARTITION[:3]]
        cells += [_cell(values.get(f"age/{key}"), ".0f")]
        cells += [_cell(values.get(f"{name}/{key}"), ".4g") for name in BY_PARTITION[3:]]
        table.add_row(str(key), *cells, _spark([value for _, value in run.series(f"loss_replayed/{key}")]))
    return table


def _guard(run: Run) -> Text | None:
    events = run.events()[-EVENTS:]
    return Text("\n".join(f"guard, step {event.step}: {event.text}" for event in events)) if events else None


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _spark(values: list[float]) -> str:
    """The last numbers as bars."""
    latest = [value for value in values if value == value][-LATEST:]
    if not latest:
        return ""
    low, high = min(latest), max(latest)
    heights = ((value - low) / (high - low) if high > low else 0.0 for value in latest)
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)
