"""Builds `docs/results/performance.md`, `docs/results/growth.md` and their pictures from the reports of the benchmarks.

    python -m scripts.benchmarks.page

Every measured number comes out of `docs/results/bench_<section>.json`, which `scripts.benchmarks.<section>` wrote with
`--json`; a section without such a file is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.benchmarks.page_cluster import EXCHANGE, SCALE
from scripts.benchmarks.page_growth import build_growth
from scripts.benchmarks.page_node import BUFFER, FILE, OVERHEAD, RAGGED
from scripts.benchmarks.page_section import Report, Section
from scripts.common.paths import ROOT
from scripts.common.report import PEERS, write_text
from scripts.common.tables import markdown_table

__all__ = ["PLANS", "SECTIONS", "build"]

HEAD = """\
# Performance

What does rehearsal cost you, and how does it scale? Counts on this page are exact. Times are medians over alternating
rounds, on a machine that does other work as well. So compare ratios within a round. CPU time of the thread stands
beside the clock where the clock says more of the machine than of the code. *Load* is how many processes wanted one of
the cores.
"""

PLAN = """\
## `rehearsal plan`

It tells you beforehand what your job will take: memory and bytes of a rank, whether a step hides the background, and
how much of the past the buffers cover.

- A whole DeepSpeed config gives the micro-batch and the accumulation itself. With a bare section, give `--batch` and
  `--accumulation`.
- `--row-bytes` is a row with all that is recorded beside it, each field rounded up to 16 bytes.
- `--links` names published figures. You can give each of them by itself (`--net-gb-s`, `--net-hop-us`, ...).
- `--json` prints what the table is made of.
"""

PLANS = (
    "rehearsal plan configs/llm_en_fr_de.json --ranks 1024 --row-bytes 32KiB --step-ms 400 --rows 500000000",
    "rehearsal plan configs/horovod_rehearsal.yaml --batch 64 --ranks 1024 --row-bytes 1KiB --step-ms 20 --links tcp",
)


SHORT = (
    (OVERHEAD, "ratio_busy", "time of a step against plain DeepSpeed, two busy cores, the worst size", "{:.3f} times"),
    (OVERHEAD, "ratio_free_core", "the same where a core is free", "{:.3f} times"),
    (BUFFER, "vs_best_peer_min", "speed of the buffer against the fastest of the others, worst case", "{:.2f} times"),
    (EXCHANGE, "bytes_ratio_max", "bytes that travel for each byte of rows, texts of 2,048 tokens", "{:.3f}"),
    (SCALE, "background_ms_16384_group", "background of a step on 16,384 GPUs by the model, not run", "{:.1f} ms"),
)
"""Figures at the top of the page: section, key of its summary, words, form."""

SECTIONS = (BUFFER, FILE, RAGGED, EXCHANGE, SCALE, OVERHEAD)


def main(argv: Sequence[str]) -> int:
    """Writes the page and says where it is."""
    parser = argparse.ArgumentParser(description="docs/results/performance.md from the reports of the benchmarks.")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page (default: %(default)s)")
    docs = parser.parse_args(argv).docs
    print(build(docs), build_growth(docs) or "", sep="\n")
    return 0


def build(docs: Path) -> Path:
    """Writes the page from the reports in `docs/results`."""
    paths = {section: docs / "results" / f"bench_{section.name}.json" for section in SECTIONS}
    reports = {section: json.loads(path.read_text()) for section, path in paths.items() if path.is_file()}
    parts = [HEAD, *in_short(reports)]
    for section, report in reports.items():
        parts += written(section, report, docs)
    return write_text(docs / "results" / "performance.md", "\n".join([*parts, PLAN, *map(planned, PLANS)]))


def in_short(reports: Mapping[Section, Report]) -> list[str]:
    """The few figures that most readers come for."""
    given = [(reports[section]["summary"].get(key), *rest) for section, key, *rest in SHORT if section in reports]
    lines = [[words, form.format(value)] for value, words, form in given if value is not None]
    return ["## In short\n", markdown_table(["", "measured"], lines)] if lines else []


def written(section: Section, report: Report, docs: Path) -> list[str]:
    """One section."""
    summary = report["summary"]
    lines = [goal.line(summary[goal.key]) for goal in section.goals if goal.key in summary]
    goals = [markdown_table(["goal", "bound", "measured", ""], lines)] if lines else []
    parts = [f"## {section.title}\n", section.text, place(section, report), *goals]
    return [part for part in (*parts, *section.tables(report, docs), section.limits) if part]


def place(section: Section, report: Report) -> str:
    """The command, and where it ran."""
    where, load = report["environment"], report["summary"].get("load")
    load_text = "" if load is None else f"load {load:g}, "
    peers = "".join(f", {name} {where['versions'][name]}" for name in PEERS if name in where["versions"])
    return (
        f"`python -m scripts.benchmarks.{section.name}`; {where['ranks']} ranks on {where['cores']} cores, {load_text}"
        f"torch {where['versions']['torch']}{peers}, commit {where['commit'][:12]}.\n"
    )


def planned(command: str) -> str:
    """A command and what it prints."""
    call = [sys.executable, "-m", "rehearsal_plugin.cli", *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return f"```\n$ {command}\n{done.stdout.rstrip()}\n```\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
