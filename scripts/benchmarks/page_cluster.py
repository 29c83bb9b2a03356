"""Sections of the page of performance about many ranks: the exchange, and its scale on clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
2 to 16 processes on gloo run `Rehearsal` with nothing between two steps, and each asks for 8 rows a step. Buffers are
full. The 64 steps that are counted have headers once, as later ones do. Draws by partition have them in every step.

- *Bytes* are those that the kernel counts on the TCP connections of the exchange's own group, between two points at
  which nothing is under way. So headers and all that gloo adds are in them.
- The *ratio* is that of these bytes to the rows among them that went to another rank.
- *Messages* are those with rows that a rank sends and receives, counted at the transport, and one to and from every
  other rank for headers. *Segments* are TCP segments with data.

Numbers are means over the steps and over the ranks, and the bound on messages is for the busiest rank. The draw is
what one rank does for its own rows, out of the rows of all ranks, each asking for 8.
"""

EXCHANGE_LIMITS = """\
Rows, messages and bytes stop growing once you have more ranks than rows asked for. What a rank sums up over the table
of all ranks still grows with them: a few nanoseconds a rank, more by partition.
"""

SCALE_TEXT = """\
The model of `rehearsal plan` is an alpha-beta model. Headers go round a ring in one step of 64, rows go straight from
owner to reader, and nothing overlaps. For this machine its three figures (a collective, a message, a byte) are fitted
to steps of 2, 4 and 8 real ranks. They *foretell* those of 16, which took no part in the fit. Ranks that outnumber
the cores share them. All jobs are run several times by turns, and the pass that other work disturbed least counts: a
median over the steps of all ranks.
"""

CLUSTERS = """\
For clusters the figures are published ones, and the costs of the draw and of copies those measured here. None of it
has been run on a cluster. You see what the background takes in a step, in ms, in the mean. A step that takes longer
than that hides it:
"""

SCALE_LIMITS = """\
A step with the headers of all ranks takes longer than the mean. That is the ring over all ranks, once in 64 steps,
and your training waits for what a step does not hide of it. Where rows are drawn by partition, headers go round in
every step, and groups keep them short (`sampling.scope`).

What the model leaves out: with NCCL a rank's first message to another one makes a connection, which takes time and
memory. Under the scope `global` a rank comes to talk to all others, so take groups from some hundred GPUs on.

Measure on your own cluster with these commands. Compare `exchanged_ms` and `drawn_ms` a step (`rehearsal.metrics()`,
or `Train/Rehearsal/...` in DeepSpeed's monitor) with what `rehearsal plan` says. `waited_ms` a step should be near 0:

```
python -m pytest -m gpu
python -m scripts.benchmarks.scale --ranks 16 --json docs/results/bench_scale.json   # on a node with 16 cores or more
python -m scripts.benchmarks.exchange --json docs/results/bench_exchange.json
python -m scripts.benchmarks.page
```
"""


def exchange_tables(report: Report, docs: Path) -> list[str]:
    """Counts by rows and ranks, and the draw."""
    lines, draws, threads = [], [], []
    for row in report["rows"]:
        if row["rows"] == "threads":
            scope = "all ranks" if row["scope"] == "global" else f"groups of {row['scope']}"
            threads.append([f"{row['ranks']:,}", scope, f"{row['messages_max']:.2f}"])
            continue
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
    return [
        "Of one rank in a step:\n",
        markdown_table(heads, lines),
        "The same code on more ranks, as threads of one process:\n",
        markdown_table(["ranks", "draw from", "messages of the busiest rank"], threads),
        "The draw:\n",
        markdown_table(draw_heads, draws),
    ]


def scale_tables(report: Report, docs: Path) -> list[str]:
    """The predicted steps, 128 ranks as threads, and the clusters."""
    by_kind = {kind: [row for row in report["rows"] if row["kind"] == kind] for kind in ("validation", "model")}
    (fitted,), threads = ([row for row in report["rows"] if row["kind"] == kind] for kind in ("fit", "threads"))
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
        THREADS.format(ranks=threads[0]["ranks"]),
        markdown_table(
            ["draws from", "rows stored", "rows replayed", "off by", "score"], [as_score(row) for row in threads]
        ),
        CLUSTERS,
        clusters(by_kind["model"]),
        markdown_table(["a step of", *LINKS], hidden(by_kind["model"], first)),
        f"![The background of a step on clusters](../{PICTURE})\n\nThe picture and the last table are of {first}.\n",
        "".join(f"- `{name}`: {links.source}.\n" for name, links in LINKS.items()),
    ]


THREADS = """\
{ranks} ranks as threads of one process run the real code, with buffers of one to four rows. Each rank gave its share
of the rows, but for *off by*, and each row came as often as the others of its rank. The *score* tells by how many
standard deviations Pearson's statistic lies from its mean. Tests hold both.
"""


def as_score(row: Mapping[str, Any]) -> list[str]:
    """The line of one check of uniformity."""
    scope = "all ranks" if row["scope"] == "global" else f"groups of {row['scope']}"
    return [
        scope,
        f"{row['rows_stored']:,}",
        f"{row['rows_replayed']:,}",
        f"{row['rank_off_by']:.1%}",
        f"{row['z']:+.2f}",
    ]


def clusters(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each load and kind of links, a column for some of the sizes."""
    shown = [gpus for gpus in dict.fromkeys(row["gpus"] for row in rows) if gpus.bit_length() % 2 or gpus == 8]
    totals = {(row["load"], row["links"], row["gpus"]): f"{row['total']:.3g}" for row in rows}
    names = dict.fromkeys((row["load"], row["links"]) for row in rows)
    lines = [[load, links, *(totals[load, links, gpus] for gpus in shown)] for load, links in names]
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
        Goal("bytes_ratio_max", "bytes sent against rows, 2,048 tokens and labels", 1.02, at_most=True),
        Goal("messages_per_rank_max", "messages of the busiest rank, twice 8 rows and 4", 20.0, at_most=True),
        Goal("collectives_per_step", "operations that all ranks issue", 2.0, at_most=True),
        Goal("draw_ms_1024", "ms of CPU time of the draw for 1,024 ranks", 1.0, at_most=True),
        Goal("draw_ms_16384", "the same for 16,384", 10.0, at_most=True),
    ),
    exchange_tables,
    EXCHANGE_LIMITS,
)
SCALE = Section(
    "scale",
    "Scale",
    SCALE_TEXT,
    (
        Goal("background_ms_16384_group", "ms on 16,384 GPUs (h100-ndr), in groups of 64", 2.0, at_most=True),
        Goal("background_ms_16384_global", "the same with rows from all ranks", 40.0, at_most=True),
        Goal("background_ms_16384_global_with_headers", "the same in a step with headers", 40.0, at_most=True),
        Goal("foretold_error_max", "times by which 16 ranks were foretold wrongly", 1.25, at_most=True),
    ),
    scale_tables,
    SCALE_LIMITS,
)
