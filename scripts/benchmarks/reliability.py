"""Reliability report: faults survived, inputs fuzzed, steps soaked, rows lost.

    python -m scripts.benchmarks.reliability --quick

It runs the tests that are marked for it. `--quick` leaves out those of Horovod, which build up a job of their own for
every fault; without it ten times as many steps and fifty times as many inputs are tried.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.common.paths import ROOT
from scripts.common.report import write_report

QUICK = {"REHEARSAL_SOAK_STEPS": "10000", "REHEARSAL_FUZZ_FACTOR": "1"}
LONG = {"REHEARSAL_SOAK_STEPS": "100000", "REHEARSAL_FUZZ_FACTOR": "50"}
MARKS = "fault or fuzz or soak"
LONGEST_S = 12 * 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under five minutes on two cores")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "reliability")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "tests.xml")
        code = run_tests(written, quick=options.quick)
        rows = rows_of(written) if written.exists() else []
    summary = summary_of(rows)
    write_report(options.out, summary, rows, ranks=2)
    for name, value in summary.items():
        print(f"{name:16} {value:>10}")
    good = code == 0 and summary["faults_tried"] == summary["faults_survived"] > 0 and not summary["rows_lost"]
    return 0 if good else 1


def run_tests(written: Path, *, quick: bool) -> int:
    """Run the marked tests; their results go to `written`, as JUnit writes them."""
    marks = f"({MARKS}) and not horovod" if quick else MARKS
    limit = () if quick else ("--timeout", "7200")
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, *limit]
    command += ["-o", "junit_family=xunit1", "--junitxml", str(written)]
    environment = {**os.environ, **(QUICK if quick else LONG), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=LONGEST_S, check=False).returncode


def rows_of(written: Path) -> list[dict[str, Any]]:
    """A row for every test: its name, how it ended, and what it counted."""
    rows = []
    for case in ElementTree.parse(written).iter("testcase"):
        counted: Counter[str] = Counter()
        for one in case.iter("property"):
            counted[one.attrib["name"]] += int(one.attrib["value"])
        ends = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        name = f"{case.attrib['classname']}.{case.attrib['name']}"
        rows.append({"test": name, "end": ends[0] if ends else "passed", **counted})
    return rows


def summary_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The figures of the report."""
    faults = [row for row in rows if row.get("faults") and row["end"] != "skipped"]
    return {
        "faults_tried": len(faults),
        "faults_survived": sum(row["end"] == "passed" for row in faults),
        "inputs_fuzzed": sum(row.get("inputs_fuzzed", 0) for row in rows),
        "steps_soaked": sum(row.get("steps_soaked", 0) for row in rows),
        "rows_lost": sum(row.get("rows_lost", 0) for row in rows),
    }


if __name__ == "__main__":
    sys.exit(main())
