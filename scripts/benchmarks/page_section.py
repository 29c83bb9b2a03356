"""A section of the page of performance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from scripts.common.goals import Goal

__all__ = ["Report", "Section"]

Report: TypeAlias = dict[str, Any]
"""Report of a benchmark: `summary`, `rows` and `environment`."""


@dataclass(frozen=True)
class Section:
    """Text and tables about one benchmark.

    Attributes:
        name: Of its script, `scripts.benchmarks.<name>`, and its report, `bench_<name>.json`.
        title: Of the section.
        text: Method of the measurement.
        goals: Bounds on figures of its summary; goals of figures that it has not are left out.
        tables: Makes paragraphs of its report and the folder of the page.
        limits: Present limits, and runs still to be made.
    """

    name: str
    title: str
    text: str
    goals: tuple[Goal, ...]
    tables: Callable[[Report, Path], list[str]]
    limits: str = ""
