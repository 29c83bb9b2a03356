"""The command line of a study, and the report of its `--size choose`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from scripts.common.paths import ROOT
from scripts.common.report import write_report
from scripts.common.tables import print_table
from scripts.studies.arms import Row
from scripts.studies.knobs import Knobs

__all__ = ["publish_choice", "study_parser"]


def study_parser(name: str, description: str, sizes: Iterable[str]) -> argparse.ArgumentParser:
    """The options that every study has; its results go to `out/study_<name>`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=list(sizes), default="small", help="how much is done (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the arms that an earlier run has finished")
    parser.add_argument("--out", type=Path, default=ROOT / f"out/study_{name}", help="folder of the results")
    return parser


def publish_choice(
    folder: Path, rows: list[Row], tried: Sequence[tuple[str, Knobs, float]], *, figure: str, title: str, ranks: int
) -> None:
    """Write and print the `figure` of each method with each of its knobs; `tried` has a method's best knobs first."""
    best = {f"{method} {figure}": value for method, _, value in reversed(tried)}
    write_report(folder, best, rows, ranks=ranks)
    lines = [
        [method, *(f"{knob:g}" for knob in asdict(knobs).values()), f"{value:.4f}"] for method, knobs, value in tried
    ]
    print_table(title, ["method", *asdict(tried[0][1]), figure], lines)
