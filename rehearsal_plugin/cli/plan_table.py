"""The estimate of `rehearsal plan` as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_plan"]


def print_plan(estimate: Mapping[str, Any]) -> None:
    """Print an estimate of `rehearsal plan`: what is assumed, the table, and what to do about it."""
    background = estimate["background_ms"]
    parts = ", ".join(f"{name} {background[name]:.3g}" for name in ("headers", "draw", "copies", "rows"))
    verdict = "hidden" if estimate["hides"] else "NOT hidden: every step waits for the rest"
    table = Table("of one rank", "", show_header=False)
    lines = {
        "row": _format_row(estimate["row_bytes"], estimate["stored_bytes"]),
        "buffer": f"{estimate['buffer_rows']:,} rows, {_format_size(estimate['buffer_bytes'])} ({estimate['storage']})",
        "rows on their way": _format_size(estimate["transit_bytes"]),
        "rows a step": f"{estimate['replayed_rows']:g} replayed, {estimate['offered_rows']:g} offered to the buffer",
        "bytes a step": f"{_format_size(estimate['rows_bytes'])} of rows, "
        f"in {estimate['messages']:g} messages; headers of {_format_size(estimate['headers_bytes'])}, "
        f"{_format_often(estimate['header_every'])}",
        "background": f"{background['total']:.3g} ms a step ({parts})",
        "step": f"{estimate['step_ms']:g} ms; the background takes {estimate['share_of_step']:.2%} of it: {verdict}",
    }
    if "past_share" in estimate:
        lines["past"] = (
            f"{estimate['past_share']:.2%} of {estimate['seen_rows']:,} rows are in the buffers of all ranks"
        )
    for name, text in lines.items():
        table.add_row(name, text)
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(f"Assumed: --links {estimate['links_name']}. {estimate['links']}.")
    console.print(table)
    if estimate["scope"] is not None:
        console.print(
            f"Set rehearsal.sampling.scope to {estimate['scope']}: ranks then draw in groups, and a step hides that."
        )
    console.print("A model, not a measurement.")
    if "left_out" in estimate:
        console.print(f"Left out: {estimate['left_out']}.")


def _format_row(moved: int, stored: int) -> str:
    if moved == stored:
        return _format_size(moved)
    return f"{_format_size(stored)} in the buffer; as long as the longest on its way: {_format_size(moved)}"


def _format_often(exchanges: int) -> str:
    return {0: "never", 1: "in every step"}.get(exchanges, f"every {exchanges} steps once buffers are full")


def _format_size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
