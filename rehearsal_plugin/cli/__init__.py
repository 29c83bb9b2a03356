"""The command `rehearsal`: checkpoints, preloading, cost plans and retrieval, without a job."""

from __future__ import annotations

import io
import sys

import typer
from rich.console import Console

from rehearsal_plugin.cli import checkpoints
from rehearsal_plugin.cli.plan import plan
from rehearsal_plugin.cli.retrieve import retrieve
from rehearsal_plugin.cli.seed import seed
from rehearsal_plugin.errors import RehearsalError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The distributed rehearsal buffer: checkpoints, rows to begin with, plans, rows that are looked for.",
)
for command in (checkpoints.inspect, checkpoints.reshard, checkpoints.merge, checkpoints.export, seed, plan, retrieve):
    app.command()(command)


def main() -> None:
    """Run the command; errors of the package are printed in one line, with exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of fields and folders that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except RehearsalError as error:
        Console(stderr=True, soft_wrap=True).print(f"rehearsal: {error}", markup=False, highlight=False)
        raise SystemExit(1) from None
