"""`rehearsal report`: a job as one page of HTML with its plots in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import typer

import rehearsal_plugin
from rehearsal_plugin.cli.runs.plots import draw_plots
from rehearsal_plugin.cli.runs.run import Run
from rehearsal_plugin.cli.runs.sources import read_run
from rehearsal_plugin.errors import DataError

__all__ = ["build_page", "report"]

STYLE = (
    "body{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1e293b}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #e2e8f0}"
    "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
)
COLUMNS = {
    "rows_offered": ("offered", ",.0f"),
    "rows_stored": ("stored", ",.0f"),
    "rows_replayed": ("replayed", ",.0f"),
    "age": ("median age in steps", ".0f"),
    "loss_new": ("loss, new", ".4g"),
    "loss_replayed": ("loss, replayed", ".4g"),
}


def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="The file of rehearsal.metrics.file, a Trainer's output_dir, or the folder of DeepSpeed's csv_monitor."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one page with plots: share met, losses and rows by domain and age, waits, events of the guard."""
    page = build_page(read_run(run))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}; make room, or give another file") from error
    print(f"wrote {out}")


def build_page(run: Run) -> str:
    """The page, which needs no other file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    parts = [f"<h1>{escape(Path(run.source).name)}</h1>", _summary(run), _partitions(run), _events(run)]
    parts += [f"<h2>{escape(title)}</h2>{svg}" for title, svg in draw_plots(run)]
    version = rehearsal_plugin.__version__
    parts.append(f"<p>rehearsal_plugin {version}; numbers of rank 0, from {escape(run.source)}</p>")
    head = f'<meta charset="utf-8"><title>{escape(run.source)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(filter(None, parts))}</body></html>\n'


def _summary(run: Run) -> str:
    values, share = run.last.values, run.total_share()
    rows = [(run.counts, f"{run.last.step:,}" + (" (ended)" if run.ended else ""))]
    rows += [(name, str(value)) for name, value in run.section.items() if value is not None]
    if share is not None:
        rows.append(("share of replayed rows", f"{share:.4g}"))
    if "ratio" in values:
        rows.append(("share asked for", f"{values['ratio']:.4g}"))
    rows += [(name, f"{values[name]:,.0f}") for name in ("rows_stored", "rows_replayed") if name in values]
    return _table(["", ""], rows)


def _partitions(run: Run) -> str:
    keys, values = run.partitions(*COLUMNS), run.last.values
    if not keys:
        return ""
    told = {name: form for name, form in COLUMNS.items() if any(f"{name}/{key}" in values for key in keys)}
    rows = [(str(key), *_cells(run, key, told)) for key in keys]
    return "<h2>Domains</h2>" + _table(["domain", *(name for name, _ in told.values())], rows)


def _cells(run: Run, key: int, told: dict[str, tuple[str, str]]) -> Iterator[str]:
    for name, (_, form) in told.items():
        value = run.last.values.get(f"{name}/{key}")
        yield "" if value is None else format(value, form)


def _events(run: Run) -> str:
    events = [(str(event.step), event.text) for event in run.events()]
    return "<h2>Guard</h2>" + _table(["step", "event"], events) if events else ""


def _table(heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"
