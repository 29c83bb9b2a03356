"""Sections of the page of performance about many ranks: the exchange, and its scale on clusters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rehearsal_plugin.runtime.cost_model import LINKS
from scripts.benchmarks.page_section import Report, Section
from scripts.benchmarks.plots import STEPS_MS, plot_scale
from scripts.common.goals import Goal
from scripts.common.tables import markdown_table

__all__ = ["EXCHANGE", "PICTURE", "SCALE", "hidden"]

PICTURE = Path("images/scale.png")

EXCHANGE_TEXT = """\
2 to 16 processes on gloo run `Rehearsal` with nothing between two steps; each asks for 8 rows a step. Bytes are those
that the kernel counts on the TCP connections of the exchange's own group, between two points at which nothing is
under way, so headers and all that gloo adds are in them. The *ratio* is that of these bytes to the rows among them
that went to another rank. *Messages* are ranks that rows are sent to, counted at the transport; *segments* are TCP
segments with data. Numbers are means over 40 steps and over the ranks. The draw is that of one rank for all ranks,
each asking for 8 rows, together with the rank's own plan: the same work on every rank. A draw by partition takes
longer, which `rehearsal plan` reckons with.
"""

EXCHANGE_LIMITS = """\
The bytes of rows are flat: 8 rows, less those that a rank draws from itself. What comes on top of them is not: a
header of 80 bytes goes round to every rank (192 bytes when rows are drawn by partition, more where over 8 partitions
change in a step), and gloo frames every message, also to ranks that get no row. That is what the ratio of small rows on
many ranks shows, and why the bound holds for the rows and ranks that it names and not for all.
"""

SCALE_TEXT = """\
The model of `rehearsal plan` is an alpha-beta model: headers go round a ring, rows straight from owner to reader, the
rank that is asked for most rows decides, nothing overlaps. For this machine its three figures (a collective, a hop, a
byte) are fitted to steps of 2, 4 and 8 real ranks, and *foretell* those of 16, which took no part in the fit. Ranks
that outnumber the cores share them. The 16 took part in how the model was made, though: an earlier one, without the
messages to ranks that get no row, foretold them worse. All jobs are run several times by turns, and the pass that
other work disturbed least counts: a median over the steps of all ranks.
"""

CLUSTERS = """\
For clusters the figures are published ones, and the costs of the draw and of copies those measured here. None of it has
been run on a cluster. What the background takes in a step, in ms; a step that takes longer than that hides it:
"""

SCALE_LIMITS = """\
What limits now is not the bytes of rows, which hardly grow with the cluster. It is the headers, a ring over all ranks;
the draw, which every rank makes for all; and a message from every rank to every other, with rows or without. All three
grow in proportion to the ranks. The messages are reckoned one after the other, each at what NCCL takes for a message
with rows: what an empty one takes is not known here. There the model is likely to be too careful, and `--message-us`
changes it.

A GPU run would have to show that `exchanged_ms` and `drawn_ms` a step (`rehearsal.metrics()`, or
`Train/Rehearsal/...` in DeepSpeed's monitor) stay below what `rehearsal plan` says, and `waited_ms` a step near 0,
with these commands on the cluster:

```
python -m pytest -m gpu
python -m scripts.benchmarks.scale --ranks 16 --json docs/results/bench_scale.json   # on a node with 16 cores or more
python -m scripts.benchmarks.exchange --json docs/results/bench_exchange.json
python -m scripts.benchmarks.page
```
"""


def exchange_tables(report: Report, docs: Path) -> list[str]:
    """Counts by rows and ranks, and the draw."""
    lines, draws = [], []
    for row in report["rows"]:
        if row["rows"] == "draw":
            clock = f"{row['ms']:.3g} ({row['ms_low']:.3g} to {row['ms_high']:.3g})"
            size = [f"{row['ranks']:,}", str(row["partitions"])]
            draws.append([*size, f"{row['cpu_ms']:.3g}", clock, str(row["rounds"])])
            continue
        counts = [f"{row[name]:.1f}" for name in ("collectives", "messages", "segments")]
        sizes = [f"{row[name]:,.0f}" for name in ("row_bytes", "wire_bytes")]
        place = [row["rows"], f"{row['bytes_a_row']:,}", str(row["ranks"])]
        lines.append([*place, *counts, *sizes, f"{row['bytes_ratio']:.3f}"])
    heads = [
        "rows",
        "bytes each",
        "ranks",
        "collectives",
        "messages",
        "segments",
        "bytes of rows",
        "bytes sent",
        "ratio",
    ]
    draw_heads = ["ranks", "partitions", "CPU ms a draw", "by the clock (quartiles)", "calls"]
    return ["Of one rank in a step:\n", markdown_table(heads, lines), "The draw:\n", markdown_table(draw_heads, draws)]


def scale_tables(report: Report, docs: Path) -> list[str]:
    """The predicted steps, 128 ranks as threads, and the clusters."""
    by_kind = {kind: [row for row in report["rows"] if row["kind"] == kind] for kind in ("validation", "model")}
    (fitted,), (threads,) = ([row for row in report["rows"] if row["kind"] == kind] for kind in ("fit", "threads"))
    lines = [
        [
            f"{row['ranks']}{' (foretold)' if row['held_out'] else ''}",
            f"{row['bytes_a_row']:,}",
            *(f"{row[name]:.3g}" for name in ("measured_ms", "foretold_ms", "ratio")),
        ]
        for row in by_kind["validation"]
    ]
    figures = f"{fitted['base_us']:.0f} µs, {fitted['hop_us']:.0f} µs, {fitted['gb_s']:.2f} GB/s"
    first = by_kind["model"][0]["load"]
    plot_scale(by_kind["model"], first, "h100-ndr", docs / PICTURE)
    return [
        f"The fit: {figures}; {fitted['cores']} cores.\n",
        markdown_table(["ranks", "bytes a row", "measured ms", "model ms", "model / measured"], lines),
        f"{threads['ranks']} ranks as threads of one process run the real code: {threads['rows_stored']} stored rows "
        f"were replayed {threads['rows_replayed']:,} times, each as often as any other (Pearson's statistic lies "
        f"{threads['z']:+.2f} standard deviations from its mean), with {threads['collectives_a_step']:.2f} collectives "
        "a step; a test holds that.\n",
        CLUSTERS,
        clusters(by_kind["model"]),
        markdown_table(["a step of", *LINKS], hidden(by_kind["model"], first)),
        f"![The background of a step on clusters]({PICTURE})\n\nThe picture and the last table are of {first}.\n",
        "".join(f"- `{name}`: {links.source}.\n" for name, links in LINKS.items()),
    ]


def clusters(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each load and kind of links, a column for some of the sizes."""
    shown = [gpus for gpus in dict.fromkeys(row["gpus"] for row in rows) if gpus.bit_length() % 2 or gpus == 8]
    totals = {(row["load"], row["links"], row["gpus"]): f"{row['total']:.3g}" for row in rows}
    names = dict.fromkeys((row["load"], row["links"]) for row in rows)
    lines = [[*name, *(totals[(*name, gpus)] for gpus in shown)] for name in names]
    return markdown_table(["rows a step and rank", "links", *(f"{gpus:,} GPUs" for gpus in shown)], lines)


def hidden(rows: Sequence[dict[str, Any]], load: str) -> list[list[str]]:
    """The largest cluster on which a step hides the background, by its length and the links."""
    lines = []
    for step in STEPS_MS:
        largest = [
            max(
                (row["gpus"] for row in rows if (row["load"], row["links"]) == (load, name) and row["total"] <= step),
                default=0,
            )
            for name in LINKS
        ]
        lines.append([f"{step:,} ms hides it up to", *(f"{gpus:,} GPUs" for gpus in largest)])
    return lines


EXCHANGE = Section(
    "exchange",
    "The exchange",
    EXCHANGE_TEXT,
    (
        Goal("bytes_ratio_max", "bytes sent against rows, 2,048 tokens and labels", 1.05, at_most=True),
        Goal("collectives_per_step", "collectives", 2.0, at_most=True),
        Goal("draw_ms_1024", "ms of CPU time of the draw for 1,024 ranks", 1.0, at_most=True),
        Goal("draw_ms_16384", "the same for 16,384", 10.0, at_most=True),
    ),
    exchange_tables,
    EXCHANGE_LIMITS,
)
SCALE = Section("scale", "Scale", SCALE_TEXT, (), scale_tables, SCALE_LIMITS)
