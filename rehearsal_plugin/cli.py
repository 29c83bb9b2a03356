"""The command `rehearsal`: checkpoints of the buffer, seen and changed without a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rehearsal_plugin.checkpoint import tools
from rehearsal_plugin.errors import RehearsalError

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Checkpoints of the distributed rehearsal buffer.")

Checkpoint = Annotated[Path, typer.Argument(help="Folder of a checkpoint; the newest complete one in it is taken.")]


@app.command()
def inspect(
    checkpoint: Checkpoint,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what is inside: rows, bytes, partitions, ages, origin."""
    found = tools.inspect(checkpoint)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


@app.command()
def reshard(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder of the new checkpoint.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that the rows are shared out between.")],
    capacity: Annotated[int | None, typer.Option(min=1, help="Most rows of each rank; all when left out.")] = None,
) -> None:
    """Share out the rows for another number of ranks, as a job does by itself when it loads."""
    print(f"{tools.reshard([checkpoint], out, ranks, capacity)} rows for {ranks} ranks in {out}")


@app.command()
def merge(
    checkpoints: Annotated[list[Path], typer.Argument(help="Folders of checkpoints with rows of the same fields.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that the rows are shared out between.")] = 1,
    capacity: Annotated[int | None, typer.Option(min=1, help="Most rows of each rank; all when left out.")] = None,
) -> None:
    """Put the rows of several checkpoints into one."""
    print(f"{tools.reshard(checkpoints, out, ranks, capacity)} rows for {ranks} ranks in {out}")


@app.command()
def export(
    checkpoint: Checkpoint,
    path: Annotated[Path, typer.Argument(help="File to write: .safetensors, or .arrow with pyarrow installed.")],
) -> None:
    """Write the rows as columns, one a field."""
    print(f"{tools.export(checkpoint, path)} rows in {path}")


def main() -> None:
    """The command; problems are told in a line, and the exit status is 1."""
    try:
        app()
    except RehearsalError as error:
        Console(stderr=True, soft_wrap=True).print(f"rehearsal: {error}", markup=False, highlight=False)
        raise SystemExit(1) from None


def _show(found: dict[str, Any]) -> None:
    console = Console(markup=False, emoji=False)  # fields may be called anything
    size = f"{found['rows']} rows of {found['row_bytes']} bytes ({found['bytes'] / 2**20:.1f} MiB)"
    console.print(f"step {found['step']}, {found['ranks']} ranks, {size}", highlight=False)
    whole = "a job of as many ranks goes on bit for bit" if found["whole"] else "rows only"
    console.print(f"{whole}; policy {found['job'].get('policy')}, strategy {found['job'].get('strategy')}")
    if found["age_steps"]:
        ages = " / ".join(f"{age:g}" for age in found["age_steps"])
        console.print(f"age in steps, quartiles: {ages}", highlight=False)
    fields = Table("field", "dtype", "shape")
    for kind, listed in (("", found["fields"]), (" (recorded)", found["state"])):
        for name, dtype, shape in listed:
            fields.add_row(f"{name}{kind}", dtype.removeprefix("torch."), str(shape))
    console.print(fields)
    partitions = Table("partition", "rows", "offered")
    for key, rows in found["rows_by_partition"].items():
        partitions.add_row(str(key), str(rows), str(found["offered_by_partition"].get(key, "")))
    console.print(partitions)
    ranks = Table("rank", "rows kept", "rows admitted there")
    for rank in sorted({*range(found["ranks"]), *found["rows_by_origin"]}):
        kept = found["rows_by_rank"][rank] if rank < found["ranks"] else 0
        ranks.add_row(str(rank), str(kept), str(found["rows_by_origin"].get(rank, 0)))
    console.print(ranks)


if __name__ == "__main__":
    main()
