"""Tables of a checkpoint's content."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_summary"]


def print_summary(summary: dict[str, Any]) -> None:
    """Print a summary that `tools.inspect` returned."""
    console = Console(markup=False, emoji=False)  # fields may be called anything
    most = "" if summary["bytes"] == summary["rows"] * summary["row_bytes"] else "up to "
    size = f"{summary['rows']} rows of {most}{summary['row_bytes']} bytes ({summary['bytes'] / 2**20:.1f} MiB)"
    console.print(f"step {summary['step']}, {summary['ranks']} ranks, {size}", highlight=False)
    whole = "a job of as many ranks goes on bit for bit" if summary["whole"] else "rows only"
    job = summary["job"]
    made = f"seeded from {job['seeded_from']}" if "seeded_from" in job else f"strategy {job.get('strategy')}"
    console.print(f"{whole}; policy {job.get('policy')}, {made}")
    if summary["age_steps"]:
        ages = " / ".join(f"{age:g}" for age in summary["age_steps"])
        console.print(f"age in steps, quartiles: {ages}", highlight=False)
    fields = Table("field", "dtype", "shape")
    for kind, listed in (("", summary["fields"]), (" (recorded)", summary["state"])):
        for name, dtype, shape in listed:
            fields.add_row(f"{name}{kind}", dtype.removeprefix("torch."), str(shape))
    console.print(fields)
    partitions = Table("partition", "rows", "offered")
    for key, rows in summary["rows_by_partition"].items():
        partitions.add_row(str(key), str(rows), str(summary["offered_by_partition"].get(key, "")))
    console.print(partitions)
    ranks = Table("rank", "rows kept", "rows admitted there")
    for rank in sorted({*range(summary["ranks"]), *summary["rows_by_origin"]}):
        kept = summary["rows_by_rank"][rank] if rank < summary["ranks"] else 0
        ranks.add_row(str(rank), str(kept), str(summary["rows_by_origin"].get(rank, 0)))
    console.print(ranks)
