"""What a checkpoint holds, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["show"]


def show(found: dict[str, Any]) -> None:
    """Print what `tools.inspect` found."""
    console = Console(markup=False, emoji=False)  # fields may be called anything
    size = f"{found['rows']} rows of {found['row_bytes']} bytes ({found['bytes'] / 2**20:.1f} MiB)"
    console.print(f"step {found['step']}, {found['ranks']} ranks, {size}", highlight=False)
    whole = "a job of as many ranks goes on bit for bit" if found["whole"] else "rows only"
    job = found["job"]
    made = f"seeded from {job['seeded_from']}" if "seeded_from" in job else f"strategy {job.get('strategy')}"
    console.print(f"{whole}; policy {job.get('policy')}, {made}")
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
