"""The main job: a small GPT goes from Python source to C++ headers, with and without rehearsal.

    python -m scripts.quickstart.run --ranks 2

starts itself on two ranks under the DeepSpeed launcher. Phase one trains one engine on Python; its `rehearsal` block
only collects rows, since `start_step` is the length of the phase. Phase two trains that engine and a second, plain
one, loaded from the checkpoint of phase one, on the same batches of C++. Writes `report.json` and `retention.png` to
`out/quickstart`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common.arguments import positive_int
from scripts.common.launch import is_rank, launch
from scripts.common.paths import ROOT


def main(argv: Sequence[str]) -> int:
    """Runs one rank where a launcher started this process, else starts the launcher; returns the exit status."""
    arguments = parse(argv)
    if not is_rank():
        return launch("scripts.quickstart.run", arguments.ranks, argv)
    run(arguments)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rehearsal on real text: Python source, then C++ headers.")
    parser.add_argument(
        "--ranks", type=positive_int, default=2, help="processes on this machine (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive_int, help="optimizer steps a phase (default: start_step of the config)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.json", help="DeepSpeed config")
    parser.add_argument("--out", type=Path, default=ROOT / "out/quickstart", help="folder of the results")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """One rank's part, from the first engine to the results; the process that starts the launcher needs no torch."""
    import torch.distributed as dist

    import rehearsal_plugin
    from scripts.common.process_group import leave_together
    from scripts.quickstart.data import load_cpp, load_python
    from scripts.quickstart.results import BOTH, WITH, WITHOUT
    from scripts.quickstart.train import Course, start_engine

    config = load_config(arguments.config, arguments.steps)
    steps, seed = config["rehearsal"]["start_step"], arguments.seed
    course = Course({"python": load_python(), "cpp": load_cpp()}, steps, seed)
    engine = start_engine(config, 2 * steps, seed)
    rehearsal = rehearsal_plugin.attach(engine)
    course.run_phase(1, "python", {BOTH: engine})
    engine.save_checkpoint(str(arguments.out / "checkpoint"))
    plain = start_engine({key: value for key, value in config.items() if key != "rehearsal"}, 2 * steps, seed)
    plain.load_checkpoint(str(arguments.out / "checkpoint"))
    course.run_phase(2, "cpp", {WITHOUT: plain, WITH: engine})
    if dist.get_rank() == 0:
        publish(course, rehearsal.metrics(), arguments.out)
    rehearsal.close()
    leave_together()


def load_config(path: Path, steps: int | None) -> dict[str, Any]:
    """The DeepSpeed config, with a phase of `steps` steps instead of its own where given."""
    config: dict[str, Any] = json.loads(path.read_text())
    if steps is not None:
        config["rehearsal"]["start_step"] = steps
    return config


def publish(course: Any, metrics: Mapping[str, float], folder: Path) -> None:
    """Prints the table and writes report and picture; `metrics` are those of this rank's rehearsal."""
    import torch.distributed as dist

    from scripts.common.report import write_report
    from scripts.quickstart.results import plot, summarise, table

    summary = summarise(course) | {name: metrics[name] for name in ("rows_offered", "rows_stored", "rows_replayed")}
    rows = [evaluation.row() for evaluation in course.evaluations]
    report = write_report(folder, summary, rows, ranks=dist.get_world_size())
    plot(course, folder / "retention.png")
    print(f"\n{table(summary)}\n\n{report}\n{folder / 'retention.png'}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
