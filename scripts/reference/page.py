"""Builds the pages of the reference that come from the code: `docs/reference/{config,cli,metrics}.md`.

python -m scripts.reference.page
"""

from __future__ import annotations

import argparse
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rehearsal_plugin.core.metrics import Metrics
from scripts.common.paths import ROOT
from scripts.common.report import write_text
from scripts.common.tables import markdown_table
from scripts.reference.config_page import config_page

__all__ = ["PAGES", "build"]

CLI_HEAD = """\
# Command line

`rehearsal` works on the files of a job, without the job. `python -m rehearsal_plugin.run` starts your script with the
plugin, as [Get started](../get_started.md) shows.
"""

METRICS_HEAD = """\
# Metrics

You get these numbers from `rehearsal.metrics()`, as totals since the start on this rank. Times are in milliseconds.
DeepSpeed's monitor shows them as `Train/Rehearsal/<name>`. The Trainer's log has some as `rehearsal/<name>`.
"""

METRICS_FOOT = """\
## By partition

With `buffer.partition_by` you also get `rows_offered/<key>`, `rows_stored/<key>` and `rows_replayed/<key>`. With
`losses_every` there are `tokens_new/<key>`, `tokens_replayed/<key>`, `loss_new/<key>` and `loss_replayed/<key>` too.
Where a budget or the weights `forgetting` follow the losses, there is `forgetting/<key>`: by which part the loss on the
replayed rows of all ranks has risen. A budget adds `ratio` and `loss_weight`, as they are now.
Where your data has more partitions, you get the numbers of the 1,024 that offered most rows.

## How to read them

- `rows_offered` counts the candidates that came to the buffer of your rank. `rows_admitted` counts those that the
  policy let in, and newer rows may have replaced them since. `rows_stored` is what the buffer holds now.
- Divide `rows_replayed` by all rows that the model saw, and you have the share that you asked for.
- A job that goes on bit for bit goes on with its totals. After any other load they begin at 0. But
  `rows_offered/<key>` belongs to the buffer, and still counts what was offered before. The last line of the log, and
  `rehearsal watch`, tell the share of this job alone.
- Times are totals of the whole job. For the time of a step, divide the difference of two readings by the steps between.
- `waited_ms` is what a step lost to the background, and `augmented_ms` is spent on the training thread. All others pass
  in the background, while your model computes.

## What to look at first

- `rows_replayed` stays 0: see [Nothing is replayed](troubleshooting.md#nothing-is-replayed).
- `waited_ms` grows by milliseconds a step: your step is shorter than the exchange. `rehearsal plan` tells by how much.
- `failures` is above 0: a rank goes on alone, because you set `exchange.on_failure: local`.
- `loss_replayed` rises while `loss_new` falls: the model forgets. Give
  [a forgetting budget](../guides/monitoring.md#a-forgetting-budget), or let
  [the guard](../guides/monitoring.md#the-guard) react.
"""


def main(argv: Sequence[str]) -> int:
    """Writes the pages and says where they are."""
    parser = argparse.ArgumentParser(description="Pages of the reference from the code.")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages (default: %(default)s)")
    print(*build(parser.parse_args(argv).docs), sep="\n")
    return 0


def build(docs: Path) -> list[Path]:
    """Writes every page."""
    return [write_text(docs / "reference" / name, page()) for name, page in PAGES.items()]


def cli_page() -> str:
    """The commands, as typer tells them."""
    call = [sys.executable, "-m", "typer", "rehearsal_plugin.cli", "utils", "docs", "--name", "rehearsal"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    commands = done.stdout[done.stdout.index("## `rehearsal ") :].strip()
    told = re.findall(r"^## `(rehearsal (\w+))`\n\n(.*)$", commands, re.MULTILINE)
    lines = ([f"[`{name}`](#rehearsal-{word})", text] for name, word, text in told)
    return "\n".join([CLI_HEAD, markdown_table(["command", "what it does"], lines), commands, ""])


def metrics_page() -> str:
    """The totals, from the docstring of the class that counts them."""
    table = markdown_table(["name", "meaning"], ([f"`{name}`", text] for name, text in totals().items()))
    return "\n".join([METRICS_HEAD, table, METRICS_FOOT])


def totals() -> dict[str, str]:
    """Name to meaning of every number that each job has."""
    text = inspect.getdoc(Metrics) or ""
    lines = text.partition("Attributes:\n")[2]
    told = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", lines, re.MULTILINE)
    names = Metrics().flat()
    return {name: " ".join(meaning.split()) for name, meaning in told if name in names}


PAGES: dict[str, Callable[[], str]] = {"config.md": config_page, "cli.md": cli_page, "metrics.md": metrics_page}
"""File in `docs/reference`, and what makes it."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
