"""The command, and the table of its findings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from rehearsal_plugin.cli.doctor.finding import Finding, fine, problem
from rehearsal_plugin.cli.doctor.machine import check_memory, check_paths
from rehearsal_plugin.cli.doctor.packages import check_copies, check_packages
from rehearsal_plugin.cli.doctor.ranks import check_exchange, launched
from rehearsal_plugin.cli.row_size import RowSize, row_size
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import ConfigError

__all__ = ["doctor"]

Option = typer.Option
STYLES = {"fine": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="The section, or a whole DeepSpeed config: JSON or YAML.", show_default=False)
    ] = None,
    ranks: Annotated[int, Option(min=2, help="Ranks of this machine; a launcher tells them by itself.")] = 2,
    row_bytes: Annotated[str | None, Option(help="A row, for a capacity in rows: bytes, or such as 16KiB.")] = None,
    field: Annotated[list[str] | None, Option(help="In place of it: NAME=DTYPE[SHAPE], one for each field.")] = None,
    rows_of: Annotated[Path | None, Option(help="In place of it: a checkpoint with such rows.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Look at versions, frameworks, memory, paths and the network, and say what to mend.

    Under torchrun, as `torchrun ... -m rehearsal_plugin.doctor`, all ranks are looked at. The exit status is 1 where
    there is a problem.
    """
    told = row_bytes is not None or bool(field) or rows_of is not None
    size = row_size(row_bytes, field or [], rows_of) if told else None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    findings = [*check_packages(), *check_copies(), *_check_config(config, here, size), *check_exchange(ranks)]
    findings = _with_other_ranks(findings)
    if not launched() or os.environ["RANK"] == "0":
        _print_findings(findings, as_json)
    if dist.is_initialized():
        dist.destroy_process_group()
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _check_config(path: Path | None, ranks: int, size: RowSize | None) -> Iterator[Finding]:
    if path is None:
        yield fine("config", "none was given, so memory and paths are those of the defaults")
    try:
        config = RehearsalConfig() if path is None else RehearsalConfig.load(path, open_names=True)
        stored = None if size is None else size.held(config.buffer.storage)
        memory = [*check_memory(config, ranks, stored), *check_paths(config)]
    except ConfigError as error:
        yield problem("config", str(error), f"correct {path}")
        return
    if path is not None:
        yield fine("config", f"{path} can be used" + ("" if config.enabled else ", and says enabled: false"))
    yield from memory


def _with_other_ranks(findings: list[Finding]) -> list[Finding]:
    """The findings of this rank, and what is not fine on the others."""
    if not dist.is_initialized():
        return findings
    everyone: list[list[Finding]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, findings)
    others = [
        Finding(found.topic, found.level, f"rank {rank}: {found.text}", found.cure)
        for rank, listed in enumerate(everyone)
        for found in listed
        if rank != dist.get_rank() and found.level != "fine"
    ]
    return [*findings, *others]


def _print_findings(findings: list[Finding], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    table = Table("", "about", "found, and what to do")
    for finding in findings:
        cure = f"\n{finding.cure}" if finding.cure else ""
        table.add_row(finding.level, finding.topic, finding.text + cure, style=STYLES[finding.level])
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table)
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
    console.print(f"{counts['problem']} problems, {counts['warning']} warnings")
