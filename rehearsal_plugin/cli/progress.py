"""Bars and spinners on a terminal; nothing where the output goes into a file or a pipe."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["ProgressBar", "busy"]


class ProgressBar:
    """A bar with a count and the time so far, on standard error; a context manager.

    Args:
        what: Is counted, such as `rows`.
        total: How many there will be; None where nobody knows.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        self._shown = console.is_terminal  # a disabled one of rich 14 still writes an empty line at its end
        self._progress = Progress(*columns, console=console, transient=True)
        self._task: TaskID = self._progress.add_task(what, total=total, note="")

    def set(self, count: int, note: str = "") -> None:
        """Show that so many are done, with a note behind."""
        self._progress.update(self._task, completed=count, note=note)

    def each(self, items: Iterable[int]) -> Iterable[int]:
        """The items; each is counted when the next one is asked for."""
        for done, item in enumerate(items, 1):
            yield item
            self.set(done)

    def __enter__(self) -> ProgressBar:
        if self._shown:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._progress.stop()


def busy(what: str) -> AbstractContextManager[object]:
    """A spinner beside `what`, while work goes on of which nobody knows how much there is."""
    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else nullcontext()
