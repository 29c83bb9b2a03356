"""What a step of a DeepSpeed job pays for rehearsal, on two ranks.

    python scripts/bench_overhead.py --json out/bench_overhead

Four DeepSpeed engines with the same model take turns in one job: one without a `rehearsal` block, on batches of
b + r rows; another such one, the control, whose ratio to the first tells what the machine alone makes of two engines
that do the same; one with the block, on b rows to which r are replayed; and one whose collectives are issued from the
training thread (`exchange.launch: inline`). A turn is a few steps, and ends when the background has: so all that
rehearsal does is paid for within its own turn. Ratios are those of the turns of one round. Where the memory of an
engine lies can cost it more than rehearsal, for as long as the job lives; so several jobs are asked.

Once with two busy cores, a rank on each; and once with the training threads of both ranks on one core, and all
threads of the plugin on the other: a core is free for the background then. The second needs two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import deepspeed
import torch
import torch.distributed as dist
from bench import Timing, arguments_of, measure, publish, ratio
from launch import is_rank, launch
from report import write_text
from study import print_table
from torch import Tensor, nn

import rehearsal_plugin

RANKS = 2
NEW, REPLAYED = 6, 2
"""Rows of a batch on a rank, b and r."""

PLAIN, CONTROL, THREAD, INLINE = ENGINES = ("plain", "control", "thread", "inline")
ROW_BYTES = (16 << 10, 128 << 10, 1 << 20)
COUNTS = ("collectives", "rows_replayed")
PHASES = ("augmented_ms", "waited_ms", "written_ms", "drawn_ms", "exchanged_ms")
"""Of a step: the first two on the training thread, the others in the background."""

CLOCKS = ("wall_s", "cpu_s")
"""Seconds of every turn: by the clock, and of all threads of rank 0 together."""

Measured: TypeAlias = dict[str, dict[str, Any]]
"""What a job tells of each engine: its turns by both clocks, phases and counts."""

WIDTH = 512
STORED, SETTLED = 60, 12
"""Rows of a buffer, and steps until it is full. `fifo` keeps every candidate: nobody writes more."""


@dataclass(frozen=True)
class Case:
    """One job: how large rows are, and whether the plugin's threads have a core to themselves."""

    row_bytes: int
    free_core: bool
    rounds: int
    steps: int
    step_ms: int


class Model(nn.Module):
    """Reads all of a row, and computes for about as long as it is told."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)))
        self.head = nn.Linear(WIDTH, 10)
        self._passes = layers

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """The mean loss of rows `x` `[b, n]` float32 with labels `[b]` int64."""
        hidden = x.view(len(x), -1, WIDTH).mean(1, keepdim=True).expand(-1, 64, -1)
        for _ in range(self._passes):
            hidden = hidden + self.layers(hidden)
        return nn.functional.cross_entropy(self.head(hidden.mean(1)), label)


def main(argv: Sequence[str]) -> int:
    """Starts a job for every case, and sums up."""
    description = (__doc__ or "").partition("\n")[0]
    arguments = arguments_of(description, argv, jobs=3, rounds=9, steps=5, step_ms=200)
    cases = [
        Case(row_bytes, free, arguments.rounds, arguments.steps, arguments.step_ms)
        for free in ((False, True) if len(os.sched_getaffinity(0)) > 1 else (False,))
        for row_bytes in ROW_BYTES
    ]
    rows = [row for case in cases for row in lines(case, [run(case) for _ in range(arguments.jobs)])]
    print_table("A step on rank 0", *table(rows))
    publish(arguments.json, summarise(rows), rows, ranks=RANKS)
    return 0


def run(case: Case) -> Measured:
    """What a job of its own measures.

    Raises:
        SystemExit: The job failed; what it printed is above.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        status = launch(Path(__file__), RANKS, [json.dumps(asdict(case)), str(path)])
        if status:
            raise SystemExit(f"the job with rows of {case.row_bytes} bytes ended with status {status}")
        measured: Measured = json.loads(path.read_text())
        return measured


def job(argv: Sequence[str]) -> int:
    """One rank of a case."""
    case, path = Case(**json.loads(argv[0])), Path(argv[1])
    torch.set_num_threads(1)
    # An optional operator for collectives in shared memory, which would first be compiled for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    training, background = cores(case.free_core)
    os.sched_setaffinity(0, training)
    deepspeed.init_distributed("gloo")
    passes = calibrate(case)
    sides = {name: Side(case, passes, None) for name in (PLAIN, CONTROL)}
    os.sched_setaffinity(0, background)  # threads that are started from here on stay there
    sides |= {launched: Side(case, passes, launched) for launched in (THREAD, INLINE)}
    os.sched_setaffinity(0, training)
    for side in sides.values():
        side.begin()
    timings = measure({name: side.turn for name, side in sides.items()}, case.rounds)
    if dist.get_rank() == 0:
        told = {name: side.told(timings[name]) for name, side in sides.items()}
        write_text(path, json.dumps(told))
    for side in sides.values():
        side.close()
    dist.barrier()
    dist.destroy_process_group()
    return 0


def cores(free: bool) -> tuple[set[int], set[int]]:
    """Where training threads run, and where the plugin's do."""
    own = os.sched_getaffinity(0)
    return ({min(own)}, own - {min(own)}) if free else (own, own)


class Side:
    """An engine that takes its turns.

    Args:
        case: The job.
        passes: How often the model computes.
        launched: From where collectives are issued; None for an engine without rehearsal.
    """

    def __init__(self, case: Case, passes: int, launched: str | None) -> None:
        rows = NEW + REPLAYED if launched is None else NEW
        self._steps, self._count = case.steps, 0
        self._batches = [batch_of(rows, case.row_bytes) for _ in range(4)]
        self._engine = engine_of(passes, rows, launched)
        self.handle = rehearsal_plugin.attach(self._engine)
        self.cpu_s: list[float] = []
        self._before: dict[str, float] = {}
        for _ in range(SETTLED):
            self._step()

    def begin(self) -> None:
        """Count from here on."""
        self.drain()
        self._before, self._count = self.handle.metrics(), 0

    def turn(self) -> None:
        """A few steps, and the rest of what they began in the background."""
        dist.barrier()
        start = time.process_time()
        for _ in range(self._steps):
            self._step()
        self.drain()
        self.cpu_s.append(time.process_time() - start)

    def drain(self) -> None:
        """Wait for the background."""
        if self.handle.rehearsal is not None:
            self.handle.rehearsal.drain()

    def told(self, timing: Timing) -> dict[str, Any]:
        """Its turns by both clocks; with rehearsal, milliseconds of each phase and what is counted, a step."""
        metrics = self.handle.metrics()
        names = [name for name in (*PHASES, *COUNTS) if name in metrics]
        a_step = {name: (metrics[name] - self._before[name]) / self._count for name in names}
        return {**dict(zip(CLOCKS, (timing.wall_s, self.cpu_s), strict=True)), **a_step}

    def close(self) -> None:
        """Stop the background."""
        self.handle.close()

    def _step(self) -> None:
        x, label = self._batches[self._count % len(self._batches)]
        self._engine.backward(self._engine(x, label))
        self._engine.step()
        self._count += 1


def batch_of(rows: int, row_bytes: int) -> tuple[Tensor, Tensor]:
    """Random rows `[rows, row_bytes / 4]` float32 and labels `[rows]` int64."""
    return torch.randn(rows, row_bytes // 4), torch.randint(0, 10, (rows,))


def engine_of(passes: int, rows: int, launched: str | None) -> Any:
    """A DeepSpeed engine, with a `rehearsal` block where `launched` says from where collectives are issued."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "steps_per_print": 1_000_000,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    if launched is not None:
        config["rehearsal"] = {
            "ratio": REPLAYED / (NEW + REPLAYED),
            "buffer": {"capacity": STORED, "policy": "fifo"},
            "exchange": {"launch": launched},
        }
    engine, *_ = deepspeed.initialize(model=Model(passes), config=config)
    return engine


def calibrate(case: Case) -> int:
    """How often the model has to compute for a step of the wanted length on a core of its own, alike on all ranks."""
    model, (x, label) = Model(8), batch_of(NEW + REPLAYED, case.row_bytes)
    seconds = measure({"step": lambda: model(x, label).backward()}, 5)["step"].cpu_median_s
    passes = torch.tensor([max(1.0, 8e-3 * case.step_ms / seconds)])
    dist.all_reduce(passes)
    return max(1, round(float(passes) / dist.get_world_size()))


def lines(case: Case, jobs: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """What is told of each engine: of the turns of all jobs together, and the mean of what is told of a step."""
    for name in ENGINES:
        told = [job[name] for job in jobs]
        paid, cpu = (ratio(*(pooled(jobs, engine, clock) for engine in (name, PLAIN))) for clock in CLOCKS)
        yield {
            **{key: value for key, value in asdict(case).items() if key != "step_ms"},
            "jobs": len(jobs),
            "engine": name,
            "step_bytes": case.row_bytes * (NEW + REPLAYED),
            "step_ms": 1e3 * statistics.median(pooled(jobs, name, CLOCKS[0])) / case.steps,
            "ratio": paid.median,
            "ratio_low": paid.low,
            "ratio_high": paid.high,
            "cpu_ratio": cpu.median,
            "cpu_ratio_low": cpu.low,
            "cpu_ratio_high": cpu.high,
            **{key: statistics.fmean(one[key] for one in told) for key in told[0] if key not in CLOCKS},
        }


def pooled(jobs: Sequence[Measured], engine: str, clock: str) -> list[float]:
    """The seconds of all turns of an engine, in all jobs."""
    return [seconds for job in jobs for seconds in job[engine][clock]]


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The largest ratios of all sizes of rows: with a free core, and on two busy ones."""
    summary = {}
    for key, free in (("ratio_busy", False), ("ratio_free_core", True)):
        for engine, name in ((THREAD, key), (INLINE, f"{key}_inline"), (CONTROL, f"{key}_control")):
            ratios = [row["ratio"] for row in rows if row["free_core"] == free and row["engine"] == engine]
            if ratios:
                summary[name] = max(ratios)
    return summary


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line for every engine of every case."""
    header = ["MiB a step", "free core", "engine", "ms", "ratio", "CPU ratio", *(name[:-3] for name in PHASES)]
    body = []
    for row in rows:
        spread = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        phases = [f"{row[name]:.2f}" if name in row else "" for name in PHASES]
        start = [f"{row['step_bytes'] / 2**20:.2g}", "yes" if row["free_core"] else "no", row["engine"]]
        body.append([*start, f"{row['step_ms']:.1f}", spread, f"{row['cpu_ratio']:.3f}", *phases])
    return header, body


if __name__ == "__main__":
    sys.exit(job(sys.argv[1:]) if is_rank() else main(sys.argv[1:]))
