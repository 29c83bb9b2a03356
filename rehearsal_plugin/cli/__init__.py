"""The command `rehearsal`: checks, plans, preloading, running jobs, checkpoints and retrieval."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer
from rich.console import Console

import rehearsal_plugin
from rehearsal_plugin.cli import checkpoints
from rehearsal_plugin.cli.doctor import doctor
from rehearsal_plugin.cli.examples import EXAMPLES
from rehearsal_plugin.cli.plan import plan
from rehearsal_plugin.cli.retrieve import retrieve
from rehearsal_plugin.cli.runs import report, watch
from rehearsal_plugin.cli.seed import seed
from rehearsal_plugin.errors import RehearsalError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The distributed rehearsal buffer: checks, plans, rows to begin with, running jobs, checkpoints, retrieval.",
)
ON_CHECKPOINTS = (checkpoints.inspect, checkpoints.reshard, checkpoints.merge, checkpoints.export)
for command in (doctor, plan, seed, watch, report, *ON_CHECKPOINTS, retrieve):
    # A paragraph a line, as rich joins the lines of a paragraph.
    app.command(epilog="Examples:\n\n" + EXAMPLES[command.__name__].replace("\n", "\n\n"))(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rehearsal_plugin {rehearsal_plugin.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Tell the version of the package."),
    ] = False,
) -> None:
    """Options of the command itself."""


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
