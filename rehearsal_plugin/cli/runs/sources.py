"""Reads runs: the file of `rehearsal.metrics.file`, a Trainer's `trainer_state.json`, or DeepSpeed's CSV monitor."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rehearsal_plugin.cli.runs.run import Point, Run
from rehearsal_plugin.errors import DataError

__all__ = ["read_run"]

OF_A_TRAINER, OF_DEEPSPEED = "trainer_state.json", "Train_Rehearsal_*.csv"
IN_A_FOLDER = ("*.jsonl", OF_A_TRAINER, f"checkpoint-*/{OF_A_TRAINER}", OF_DEEPSPEED, f"*/{OF_DEEPSPEED}")
CURE = (
    "name the file of rehearsal.metrics.file, a Trainer's output_dir with checkpoints, or the folder of DeepSpeed's "
    "csv_monitor"
)


def read_run(path: Path) -> Run:
    """What a run has told so far.

    Args:
        path: A file, or a folder in which the newest file of a run is taken.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    file = _newest_file(path) if path.is_dir() else path
    try:
        if file.suffix == ".csv":
            run = _read_csv(file.parent)
        elif file.name == OF_A_TRAINER:
            run = _read_trainer_state(file)
        else:
            run = _read_metrics(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} is not there yet; start the job first, or {CURE}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{file} cannot be read as the log of a run: {error}; {CURE}") from error
    if not run.points:
        raise DataError(f"{file} tells nothing of a rehearsal yet; wait for its first steps, log more often, or {CURE}")
    return run


def _newest_file(folder: Path) -> Path:
    files = [file for pattern in IN_A_FOLDER for file in folder.glob(pattern) if _is_of_run(file)]
    if not files:
        raise DataError(f"{folder} has no log of a rehearsal; {CURE}")
    return max(files, key=lambda file: file.stat().st_mtime)


def _is_of_run(file: Path) -> bool:
    """Whether a file is not just any JSONL."""
    if file.suffix != ".jsonl":
        return True
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = next(lines, "")
    return '"event": "start"' in first or '"rows_seen"' in first


def _read_metrics(file: Path) -> Run:
    earlier = file.with_name(file.name + ".1")
    points: list[Point] = []
    section: dict[str, Any] = {}
    ended = False
    for record in [*_records_of(earlier), *_records_of(file, required=True)]:
        if record.get("event") == "start":  # of a job that goes on from there, so what came later did not happen
            points = [point for point in points if point.step < record["step"]]
            section = {"ranks": record["ranks"], **record["section"]}
        ended = record.get("event") == "end"
        if "event" not in record:
            points.append(Point(record["step"], _flat_values(record), record["time"]))
    return Run(str(file), points, section, ended)


def _records_of(file: Path, *, required: bool = False) -> Iterator[dict[str, Any]]:
    if not required and not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may be on its way
            yield json.loads(line)


def _flat_values(record: dict[str, Any]) -> dict[str, float]:
    values = dict(record["metrics"])
    values |= {f"age_{place}": age for place, age in enumerate(record.get("age", ()))}
    values |= {name: value for name, value in record.items() if name.startswith("age/")}
    values |= {name: record[name] for name in ("rows_new", "rows_seen", "ratio") if record[name] is not None}
    if record["guard"] is not None:
        values["guard_exceeded"] = float(record["guard"]["exceeded"])
    return values


def _read_trainer_state(file: Path) -> Run:
    logs = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    prefix = "rehearsal/"
    told = ((log["step"], {name: log[name] for name in log if name.startswith(prefix)}) for log in logs)
    points = [Point(step, {name[len(prefix) :]: value for name, value in log.items()}) for step, log in told if log]
    return Run(str(file), points)


def _read_csv(folder: Path) -> Run:
    by_step: dict[int, dict[str, float]] = defaultdict(dict)
    for file in sorted(folder.glob(OF_DEEPSPEED)):
        # The monitor writes `rows_stored/3` as `rows_stored_3`.
        name = re.sub(r"_(-?\d+)$", r"/\1", file.stem.removeprefix("Train_Rehearsal_"))
        for step, value in _numbers_in(file):
            by_step[step][name] = value
    points = [Point(step, values) for step, values in sorted(by_step.items())]
    return Run(str(folder), points, counts="sample")


def _numbers_in(file: Path) -> Iterable[tuple[int, float]]:
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.reader(lines):
            if row and row[0] != "step":  # a header stands before the rows of each job
                yield int(row[0]), float(row[1])
