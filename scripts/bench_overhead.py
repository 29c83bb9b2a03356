"""What a step of a DeepSpeed job pays for rehearsal, on two ranks.

    python scripts/bench_overhead.py --json out/bench_overhead

A ResNet-18 trains on images of several sizes, 12 new and 2 replayed ones a step and rank; the largest are those of
ImageNet, 8 MiB a step. One DeepSpeed engine takes all turns, with the same memory: as it is, on batches of b + r rows;
once more so, the control, whose ratio to the first tells what the machine alone makes of two that do the same; with
rehearsal, on b rows to which r are replayed; and with rehearsal whose collectives are issued from the training thread
(`exchange.launch: inline`). A turn is a step; with rehearsal one before it, untimed, sees to it that the background of
a step runs behind the next one, as in a job.

A machine that is shared changes its speed from second to second, by more than rehearsal costs. So a small product of
matrices is timed at every convolution of the network, forwards and backwards, and a step is told in units of it.

Once with two busy cores, a rank on each; and once with the training threads of both ranks on one core, and all
threads of the plugin on the other: a core is free for the background then. The second needs two cores.
"""

from __future__ import annotations

import json
import math
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
from bench import arguments_of, publish, ratio
from launch import is_rank, launch
from report import write_text
from study import print_table
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import rehearsal_plugin

RANKS = 2
NEW, REPLAYED = 12, 2
"""Rows of a batch on a rank, b and r."""

PLAIN, CONTROL, THREAD, INLINE = ENGINES = ("plain", "control", "thread", "inline")
PIXELS = (64, 112, 224)
COUNTS = ("collectives", "rows_replayed")
PHASES = ("augmented_ms", "waited_ms", "written_ms", "drawn_ms", "exchanged_ms")
"""Of a step: the first two on the training thread, the others in the background."""

CLOCKS = ("wall", "cpu")
"""A step by the clock, and by the CPU time of all threads of rank 0 together; in units of the gauge."""

Measured: TypeAlias = dict[str, dict[str, Any]]
"""What a job tells of each engine: its turns by both clocks, phases and counts."""

STORED, SETTLED = 36, 5
"""Rows of a buffer, and steps until it is full. `fifo` keeps every candidate: nobody writes more."""


@dataclass(frozen=True)
class Case:
    """One job: the size of its images, whether the plugin's threads have a core to themselves, and how long it runs."""

    pixels: int
    free_core: bool
    seconds: float

    @property
    def row_bytes(self) -> int:
        """Bytes of an image, float32 in three colours."""
        return 3 * 4 * self.pixels**2


class Gauge:
    """Tells how fast the core is while a step runs.

    Args:
        model: The product is timed whenever one of its convolutions begins, forwards or backwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self._factors = torch.randn(128, 512), torch.randn(512, 512)
        self._seconds: list[float] = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(self._time)
                module.register_full_backward_pre_hook(self._time)

    def reset(self) -> None:
        """Forget what was timed."""
        self._seconds.clear()

    def read(self) -> float:
        """Mean seconds of CPU time of the product since the last reset."""
        return statistics.fmean(self._seconds)

    def _time(self, *_: object) -> None:
        start = time.thread_time()
        torch.mm(*self._factors)
        self._seconds.append(time.thread_time() - start)


def main(argv: Sequence[str]) -> int:
    """Starts a job for every case, and sums up."""
    description = (__doc__ or "").partition("\n")[0]
    arguments = arguments_of(description, argv, seconds=150)
    cases = [
        Case(pixels, free, arguments.seconds * math.sqrt(pixels / PIXELS[0]) * (1 if free else 0.5))
        for free in ((False, True) if len(os.sched_getaffinity(0)) > 1 else (False,))
        for pixels in PIXELS
    ]
    rows = [row for case in cases for row in lines(case, run(case))]
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
            raise SystemExit(f"the job with images of {case.pixels} pixels ended with status {status}")
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
    engine = new_engine()
    gauge = Gauge(engine.module)
    os.sched_setaffinity(0, background)  # threads that are started from here on stay there
    sides = {name: Side(engine, gauge, case, name if name in (THREAD, INLINE) else None) for name in ENGINES}
    os.sched_setaffinity(0, training)
    take_turns(list(sides.values()), case.seconds)
    if dist.get_rank() == 0:
        write_text(path, json.dumps({name: side.told() for name, side in sides.items()}))
    for side in sides.values():
        side.handle.close()
    dist.barrier()
    dist.destroy_process_group()
    return 0


def take_turns(sides: Sequence[Side], seconds: float) -> None:
    """Rounds for about so long, at least two; every round begins with another side."""
    start, rounds = time.monotonic(), 0
    going = torch.ones(1)
    while rounds < 2 or going.item():
        for side in (*sides[rounds % len(sides) :], *sides[: rounds % len(sides)]):
            side.turn()
        rounds += 1
        going.fill_(time.monotonic() - start < seconds)
        dist.broadcast(going, 0)


def cores(free: bool) -> tuple[set[int], set[int]]:
    """Where training threads run, and where the plugin's do."""
    own = os.sched_getaffinity(0)
    return ({min(own)}, own - {min(own)}) if free else (own, own)


class Side:
    """An engine that takes its turns, with rehearsal or without.

    Args:
        engine: The same for all sides; whoever's turn it is puts its own methods in place.
        gauge: Of its model.
        case: The job.
        launched: From where collectives are issued; None without rehearsal.
    """

    def __init__(self, engine: Any, gauge: Gauge, case: Case, launched: str | None) -> None:
        self._batches = [batch_of(NEW + (REPLAYED if launched is None else 0), case.pixels) for _ in range(4)]
        self._engine, self._gauge, self._steps = engine, gauge, 0
        bare = engine.forward, engine.step
        self.handle = rehearsal_plugin.attach(engine, {"enabled": False} if launched is None else section(launched))
        self._methods = engine.forward, engine.step
        engine.rehearsal = None
        self.turns: dict[str, list[float]] = {clock: [] for clock in CLOCKS}
        self.seconds: list[float] = []
        self._step(SETTLED if self.handle.enabled else 1)
        engine.forward, engine.step = bare
        self._before, self._steps = self.handle.metrics(), 0

    def turn(self) -> None:
        """A step; its background is waited for when the clock has stopped."""
        if self.handle.enabled:
            self._step(1)
        dist.barrier()
        self._gauge.reset()
        clock, cpu = time.perf_counter(), time.process_time()
        self._step(1)
        clock, cpu, unit = time.perf_counter() - clock, time.process_time() - cpu, self._gauge.read()
        if self.handle.rehearsal is not None:
            self.handle.rehearsal.drain()
        self.seconds.append(clock)
        for name, taken in zip(CLOCKS, (clock, cpu), strict=True):
            self.turns[name].append(taken / unit)

    def told(self) -> dict[str, Any]:
        """Its turns by both clocks; with rehearsal, milliseconds of each phase and what is counted, a step."""
        metrics = self.handle.metrics()
        names = [name for name in (*PHASES, *COUNTS) if name in metrics]
        a_step = {name: (metrics[name] - self._before[name]) / self._steps for name in names}
        return {**self.turns, "step_ms": 1e3 * statistics.median(self.seconds), **a_step}

    def _step(self, count: int) -> None:
        self._engine.forward, self._engine.step = self._methods
        for _ in range(count):
            x, label = self._batches[self._steps % len(self._batches)]
            self._engine.backward(self._engine(x, label).loss)
            self._engine.step()
            self._steps += 1


def batch_of(rows: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Random images `[rows, 3, pixels, pixels]` float32 and labels `[rows]` int64."""
    return torch.randn(rows, 3, pixels, pixels), torch.randint(0, 2, (rows,))


def new_engine() -> Any:
    """A DeepSpeed engine without a `rehearsal` block: ZeRO-1 and AdamW over a ResNet-18."""
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    config = {
        "train_micro_batch_size_per_gpu": NEW + REPLAYED,
        "steps_per_print": 1_000_000,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=ResNetForImageClassification(resnet), config=config)
    return engine


def section(launched: str) -> dict[str, Any]:
    """The `rehearsal` section."""
    return {
        "ratio": REPLAYED / (NEW + REPLAYED),
        "buffer": {"capacity": STORED, "policy": "fifo"},
        "exchange": {"launch": launched},
    }


def lines(case: Case, measured: Measured) -> Iterator[dict[str, Any]]:
    """What is told of each engine: its turns against those of the plain one, and means of a step."""
    for name, told in measured.items():
        paid, cpu = (ratio(told[clock], measured[PLAIN][clock]) for clock in CLOCKS)
        yield {
            "pixels": case.pixels,
            "free_core": case.free_core,
            "rounds": len(told[CLOCKS[0]]),
            "engine": name,
            "step_bytes": case.row_bytes * (NEW + REPLAYED),
            "ratio": paid.median,
            "ratio_low": paid.low,
            "ratio_high": paid.high,
            "cpu_ratio": cpu.median,
            "cpu_ratio_low": cpu.low,
            "cpu_ratio_high": cpu.high,
            **{key: value for key, value in told.items() if key not in CLOCKS},
        }


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
