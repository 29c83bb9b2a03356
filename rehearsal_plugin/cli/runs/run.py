"""A run as points over its steps, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

__all__ = ["Event", "Point", "Run", "Series"]

Series = list[tuple[float, float]]
"""Pairs of step and value."""


@dataclass(frozen=True)
class Point:
    """What a run told at a step.

    Attributes:
        step: Optimizer step, or samples where a log counts these.
        values: Numbers by name; those of `Rehearsal.metrics`, and `rows_new`, `rows_seen`, `ratio`, `guard_exceeded`,
            `age_0` to `age_4` and `age/<partition>` of a file of metrics.
        time: Seconds since 1970; None where the log has none.
    """

    step: int
    values: Mapping[str, float]
    time: float | None = None


@dataclass(frozen=True)
class Event:
    """Something that the guard did."""

    step: int
    text: str


@dataclass(frozen=True)
class Run:
    """All that a run has told so far.

    Attributes:
        source: The file or folder, for a person.
        points: In the order of their steps.
        section: Settings of the job that are shown.
        ended: Whether the job has said that it ended.
        counts: What a step is counted in.
    """

    source: str
    points: Sequence[Point]
    section: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = False
    counts: str = "optimizer step"

    @property
    def last(self) -> Point:
        """The newest point."""
        return self.points[-1]

    def series(self, name: str) -> Series:
        """A number over the steps in which it was told."""
        return [(point.step, point.values[name]) for point in self.points if name in point.values]

    def partitions(self, *names: str) -> list[int]:
        """Keys of the partitions of which any of these numbers was told, as `loss_new/3`."""
        told = {name for point in self.points for name in point.values}
        parts = (name.partition("/") for name in told)
        return sorted({int(key) for name, _, key in parts if name in names and key.lstrip("-").isdecimal()})

    def share_met(self) -> Series:
        """Share of replayed rows, or of tokens, in what the model saw between two points."""
        for new, replayed in (("rows_new", "rows_seen"), ("tokens_new", "tokens_replayed")):
            pairs = list(_increases(self.series(new), self.series(replayed)))
            if any(more + less for _, _, more, less in pairs):
                return [(step, less / (more + less)) for _, step, more, less in pairs if more + less]
        return []

    def total_share(self) -> float | None:
        """Share of replayed rows, or of tokens, in all that the model saw."""
        for new, replayed in (("rows_new", "rows_seen"), ("tokens_new", "tokens_replayed")):
            rows = [self.last.values.get(name, 0.0) for name in (new, replayed)]
            if sum(rows):
                return rows[1] / sum(rows)
        return None

    def ms_per_step(self, name: str) -> Series:
        """Milliseconds of a step between two points, by a total such as `waited_ms`; the end is no step."""
        series = self.series(name)
        series = series[:-1] if self.ended and len(series) > 2 else series
        return [(step, more / (step - before)) for before, step, more, _ in _increases(series, series)]

    def events(self) -> list[Event]:
        """What the guard did: the loss on replayed rows left its bound or came back, or the ratio was raised."""
        found = []
        for before, now in pairwise(self.points):
            exceeded = [bool(point.values.get("guard_exceeded", 0.0)) for point in (before, now)]
            if exceeded == [False, True]:
                found.append(Event(now.step, "the loss on replayed rows went past the guard's bound"))
            if exceeded == [True, False]:
                found.append(Event(now.step, "the loss on replayed rows is within the guard's bound again"))
            ratios = [point.values.get("ratio", 0.0) for point in (before, now)]
            if "guard_exceeded" in now.values and ratios[1] > ratios[0] > 0:
                found.append(Event(now.step, f"the ratio went from {ratios[0]:.4g} to {ratios[1]:.4g}"))
        return found


def _increases(first: Series, second: Series) -> Iterator[tuple[float, float, float, float]]:
    """The steps between which two totals grew, and by how much; a total that fell was begun anew at 0."""
    steps = dict(second)
    common = [(step, value, steps[step]) for step, value in first if step in steps]
    for (before, *old), (step, *new) in pairwise(common):
        if step > before:
            more, less = (b - a if b >= a else b for a, b in zip(old, new, strict=True))
            yield before, step, more, less
