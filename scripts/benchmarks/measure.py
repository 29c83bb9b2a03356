"""Alternatives timed side by side, their ratio, and a report that says where it was measured.

Other work on the machine slows all alternatives of a round alike. So they take turns within a round, in another order
each time, and what is compared is the ratio within a round: its median and quartiles over all rounds.

    timings = measure({"old": old, "new": new}, rounds=101)
    print(timings["new"].text(), ratio(timings["new"], timings["old"]).text())
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.common.report import environment, write_report

__all__ = ["Ratio", "Timing", "arguments_of", "measure", "publish", "quartiles", "ratio"]


@dataclass(frozen=True)
class Ratio:
    """Time of one alternative as a multiple of another's: median and quartiles of the rounds' ratios."""

    median: float
    low: float
    high: float

    def text(self) -> str:
        """For a table: `1.02 (1.01 to 1.04)`."""
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Timing:
    """Seconds of one alternative, one value a round.

    Attributes:
        wall_s: By the clock; what other processes took of the core is in it.
        cpu_s: CPU time of the calling thread alone.
    """

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median of the seconds by the clock."""
        return statistics.median(self.wall_s)

    @property
    def cpu_median_s(self) -> float:
        """Median of the seconds of the CPU."""
        return statistics.median(self.cpu_s)

    def row(self) -> dict[str, float]:
        """For the rows of a report, in milliseconds: `ms`, `ms_low`, `ms_high`, `cpu_ms`, and how many rounds."""
        low, middle, high = (1e3 * seconds for seconds in quartiles(self.wall_s))
        return {"ms": middle, "ms_low": low, "ms_high": high, "cpu_ms": 1e3 * self.cpu_median_s, "rounds": self.rounds}

    @property
    def rounds(self) -> int:
        """Number of values."""
        return len(self.wall_s)

    def text(self) -> str:
        """For a table, in milliseconds: `1.21 ms (1.18 to 1.3; CPU 1.2)`."""
        row = self.row()
        return f"{row['ms']:.3g} ms ({row['ms_low']:.3g} to {row['ms_high']:.3g}; CPU {row['cpu_ms']:.3g})"


def measure(
    alternatives: Mapping[str, Callable[[], object]], rounds: int, *, calls: int = 1, warmup: int = 1
) -> dict[str, Timing]:
    """Time the alternatives by turns.

    Args:
        alternatives: Functions to call, by name.
        rounds: Number of timings of each; every round begins with another one.
        calls: Calls that are timed together, for what is too short for the clock; timings are those of one call.
        warmup: Rounds beforehand that do not count.

    Returns:
        The timings by name; the i-th values of all are those of round i.
    """
    names = list(alternatives)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = _timed(alternatives[name], calls)
            if turn >= 0:
                seconds[name].append(taken)
    return {name: Timing(*map(tuple, zip(*taken, strict=True))) for name, taken in seconds.items()}


def ratio(a: Timing | Sequence[float], b: Timing | Sequence[float]) -> Ratio:
    """By how much `a` takes longer than `b`, round by round; timings are compared by the clock.

    Raises:
        ValueError: They have not the same number of rounds.
    """
    pairs = zip(_values(a), _values(b), strict=True)
    low, middle, high = quartiles([one / other for one, other in pairs])
    return Ratio(middle, low, high)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def arguments_of(description: str, argv: Sequence[str], **defaults: int) -> argparse.Namespace:
    """The options of a benchmark: `--json`, numbers with these defaults (`rounds=101` is `--rounds`), and switches."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    for name, default in defaults.items():
        kind = {"action": "store_true"} if isinstance(default, bool) else {"type": int, "default": default}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind, help="(default: %(default)s)")
    return parser.parse_args(argv)


def publish(
    path: Path | None, summary: Mapping[str, float], rows: Sequence[Mapping[str, object]], *, ranks: int
) -> None:
    """Print the summary, the commit, the versions and the load, and write the report to `path` unless it is None.

    `load` joins the summary: how many processes wanted a core, as a mean over the last minute, this one included.
    """
    summary = {**summary, "load": round(os.getloadavg()[0], 1)}
    for name, value in summary.items():
        print(f"{name}: {value:.4g}")
    place = environment(ranks)
    versions = ", ".join(f"{package} {version}" for package, version in place["versions"].items())
    print(f"commit {place['commit']}; {place['cores']} cores; {versions}")
    if path is not None:
        print(write_report(path, summary, rows, ranks=ranks))


def _timed(function: Callable[[], object], calls: int) -> tuple[float, float]:
    cpu, wall = time.thread_time(), time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - wall) / calls, (time.thread_time() - cpu) / calls


def _values(timing: Timing | Sequence[float]) -> Sequence[float]:
    return timing.wall_s if isinstance(timing, Timing) else timing
