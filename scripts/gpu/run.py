"""Runs every part, each in a process of its own and with a deadline, and writes one report of them.

    python -m scripts.gpu.run --out out/gpu

A part that wants more GPUs than there are is skipped, and says so. One that fails or does not end leaves the others
alone. All of them together take no longer than `--minutes`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from scripts.common.paths import ROOT
from scripts.common.report import write_report
from scripts.common.tables import print_table
from scripts.gpu.parts import PARTS, Part

__all__ = ["main"]

SHORTEST_S = 5.0
"""With less time left a part is not begun."""


def main(argv: Sequence[str]) -> int:
    """Runs the parts; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description="Everything that wants a GPU.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out/gpu", help="folder of the report (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="parts; all when left out")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    end, gpus = time.monotonic() + 60 * arguments.minutes, torch.cuda.device_count()
    with (arguments.out / "log.txt").open("w", encoding="utf-8") as log:
        rows = [
            outcome(part, gpus, min(part.limit_s, end - time.monotonic()), arguments.out, log)
            for part in PARTS
            if arguments.only is None or part.name in arguments.only
        ]
    figures = {f"{row['part']}_{name}": value for row in rows for name, value in row["figures"].items()}
    counts = {state: sum(row["outcome"].startswith(state) for row in rows) for state in ("passed", "failed", "skipped")}
    device = {"gpus": gpus, **counts}
    path = write_report(arguments.out / "report.json", {**device, **figures}, rows, ranks=1)
    name = torch.cuda.get_device_name() if gpus else "no GPU"
    print_table(
        f"On {name}", ["part", "outcome", "s"], [[row["part"], row["outcome"], f"{row['s']:.0f}"] for row in rows]
    )
    print(path, arguments.out / "log.txt", sep="\n", flush=True)
    return int(counts["failed"] > 0)


def outcome(part: Part, gpus: int, limit_s: float, out: Path, log: TextIO) -> dict[str, Any]:
    """Runs a part, or says why not: its outcome, how long it took, and the figures that it left behind."""
    began = time.monotonic()
    if gpus < part.gpus:
        state = "skipped: no GPU" if not gpus else f"skipped: {gpus} of {part.gpus} GPUs"
        return {"part": part.name, "outcome": state, "s": 0.0, "figures": {}}
    if limit_s < SHORTEST_S:
        return {"part": part.name, "outcome": "skipped: no time left", "s": 0.0, "figures": {}}
    left = out / f"{part.name}.json"
    left.unlink(missing_ok=True)
    print(f"\n==== {part.name}", file=log, flush=True)
    try:
        command = [sys.executable, *(word.format(out=left, gpus=gpus) for word in part.command)]
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=limit_s, check=False).returncode
        state = "passed" if status in part.good else f"failed: exit status {status}, see log.txt"
    except subprocess.TimeoutExpired:
        state = f"failed: no end within {limit_s:.0f} s"
    figures = json.loads(left.read_text()) if left.is_file() else {}
    return {"part": part.name, "outcome": state, "s": time.monotonic() - began, "figures": figures}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
