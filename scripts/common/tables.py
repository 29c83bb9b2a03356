"""Tables: on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table", "print_table"]

WIDEST = 10_000
"""Columns of the widest table."""


def print_table(title: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print a table on the terminal, as wide as it is: a narrow terminal wraps lines, and no number is cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(*heads, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for line in lines:
        table.add_row(*line)
    console = Console()
    whole = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    Console(width=max(whole, console.width)).print(table, crop=False)


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with a line feed at its end."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines]) + "\n"
