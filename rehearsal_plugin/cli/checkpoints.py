"""`rehearsal inspect`, `reshard`, `merge` and `export`: checkpoints without a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rehearsal_plugin.checkpoint import tools
from rehearsal_plugin.cli.progress import ProgressBar, busy
from rehearsal_plugin.cli.tables import print_summary

__all__ = ["export", "inspect", "merge", "reshard"]

Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="Folder of a checkpoint, DeepSpeed's save_dir, or a Trainer's output_dir; the newest complete checkpoint "
        "in it is taken."
    ),
]


def inspect(
    checkpoint: Checkpoint,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what is inside: rows, bytes, partitions, ages, origin."""
    with busy(f"reading {checkpoint}"):
        summary = tools.inspect(checkpoint)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        print_summary(summary)


def reshard(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder of the new checkpoint.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that the rows are shared out between.")],
    capacity: Annotated[int | None, typer.Option(min=1, help="Most rows of each rank; all when left out.")] = None,
) -> None:
    """Share out the rows for another number of ranks, as a job does by itself when it loads."""
    _share_out([checkpoint], out, ranks, capacity)


def merge(
    checkpoints: Annotated[list[Path], typer.Argument(help="Folders of checkpoints with rows of the same fields.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that the rows are shared out between.")] = 1,
    capacity: Annotated[int | None, typer.Option(min=1, help="Most rows of each rank; all when left out.")] = None,
) -> None:
    """Put the rows of several checkpoints into one."""
    _share_out(checkpoints, out, ranks, capacity)


def export(
    checkpoint: Checkpoint,
    path: Annotated[Path, typer.Argument(help="File to write: .safetensors, or .arrow with pyarrow installed.")],
) -> None:
    """Write the rows as columns, one a field."""
    with busy(f"writing {path}"):
        rows = tools.export(checkpoint, path)
    print(f"{rows} rows in {path}")


def _share_out(checkpoints: list[Path], out: Path, ranks: int, capacity: int | None) -> None:
    with ProgressBar("ranks", ranks) as progress:
        rows = tools.reshard(checkpoints, out, ranks, capacity, each=progress.each)
    print(f"{rows} rows for {ranks} ranks in {out}")
