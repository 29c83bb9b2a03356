"""How the CPU time of a step grows, one quantity at a time.

    python -m scripts.benchmarks.growth --json docs/results/bench_growth.json

A point is a job in a process of its own: `Rehearsal` with a full buffer and nothing between two steps. It tells the CPU
time of the training thread, and that of all other threads of the process. Every quantity goes from small to large while
the others stay as they are in `Point()`. Where there are pauses between the steps, a training step of a tiny model
without rehearsal takes turns with them, as a control.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal_plugin import Rehearsal
from scripts.benchmarks.measure import arguments_of, publish
from scripts.benchmarks.process_ranks import on_ranks

__all__ = ["AXES", "SETTINGS", "SMALLEST", "Point", "exponent", "main", "points", "summarise"]

POLICIES = ("reservoir", "random_replace", "fifo", "balanced", "score", "herding")
EXEMPLARS = 20
LABEL_BYTES = 16
"""Of a row, its label: fields begin at multiples of 16."""
DIMENSIONS, SEARCHED = 384, 100_000
"""Of an embedding, and rows among which the nearest are looked for."""
NO_INDEX = "none"
INDEXES: dict[str, dict[str, Any]] = {
    "flat": {"index": "flat"},
    "ivf": {"index": "ivf"},
    "ivf, 16 probes": {"index": "ivf", "probes": 16},
    "hnsw": {"index": "hnsw"},
}
"""What the nearest rows are found by, and its keys of `rehearsal.retrieval`."""
SMALLEST = 32
"""Bytes of a row where there are very many."""
AT_ONCE = 64 << 20
"""Bytes of a batch that fills the buffer, and of the micro-batches that come by turns."""


@dataclass(frozen=True)
class Point:
    """A job.

    Attributes:
        ranks: Processes that share the buffer.
        rows: Stored by each.
        row_bytes: Of a row, its label among them.
        partitions: Of the rows; 1 for a buffer without partitions.
        candidates: Rows that a micro-batch offers, all that it has.
        micro_batches: Of a step.
        policy: Of the buffer.
        representatives: Rows that are replayed in a step.
        mmap: Whether rows lie in a file.
        pause_ms: Milliseconds without work before each step.
        index: One of `INDEXES`, where half of what is replayed is what is nearest; `NO_INDEX` for none of it.
    """

    ranks: int = 1
    rows: int = 10_000
    row_bytes: int = 1024
    partitions: int = 1
    candidates: int = 8
    micro_batches: int = 1
    policy: str = "reservoir"
    representatives: int = 8
    mmap: bool = False
    pause_ms: int = 0
    index: str = NO_INDEX


def _powers(low: int, high: int, base: int = 10) -> tuple[int, ...]:
    return tuple(base**power for power in range(low, high + 1))


AXES: dict[str, tuple[Any, ...]] = {
    "ranks": (1, 2, 4, 8, 16),
    "rows": _powers(4, 8),
    "row_bytes": (128, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 24),
    "partitions": _powers(0, 6),
    "candidates": (8, 64, 512, 4096),
    "micro_batches": (1, 2, 4, 8, 16, 32),
    "policy": POLICIES,
    "pause_ms": (1, 5, 20, 60),
    "index": (NO_INDEX, *INDEXES),
}
"""What grows, and its values."""

SETTINGS = {"steps": 50, "blocks": 5, "largest": 10**8}
"""Options of the command: steps of a block, blocks, and the largest value of an axis."""

LOOP = Point(row_bytes=16 << 10, representatives=2)
"""A plain loop whose steps have 8 new and 2 replayed rows of 16 KiB."""


def points(axis: str, largest: float) -> list[Point]:
    """The jobs of an axis, those up to `largest` where it is a number; with fewer rows where a row is large."""
    chosen = [value for value in AXES[axis] if isinstance(value, str) or value <= largest]
    jobs = [replace(Point(), **{axis: value}) for value in chosen]
    if axis == "rows":  # small ones, in a file
        return [replace(job, row_bytes=SMALLEST, mmap=True) for job in jobs]
    if axis == "partitions":  # so that each has a row at least
        return [replace(job, rows=max(job.rows, job.partitions), row_bytes=SMALLEST) for job in jobs]
    if axis == "index":
        return [replace(job, rows=SEARCHED, row_bytes=4 * DIMENSIONS + LABEL_BYTES) for job in jobs]
    if axis == "policy":  # herding compares all rows of a partition with each other
        return [replace(job, rows=EXEMPLARS if job.policy == "herding" else job.rows) for job in jobs]
    return [replace(job, rows=min(job.rows, (1 << 30) // job.row_bytes)) for job in jobs]


def section_of(point: Point, folder: str) -> dict[str, Any]:
    """The `rehearsal` section of a job."""
    buffer: dict[str, Any] = {"capacity": point.rows, "policy": point.policy}
    if point.mmap:
        buffer |= {"storage": "mmap", "path": folder}
    if point.partitions > 1 or point.policy in ("balanced", "herding"):
        buffer["partition_by"] = "label"
    if point.policy in ("score", "herding"):
        buffer["score_by"] = "score"
    section: dict[str, Any] = {"buffer": buffer, "representatives": point.representatives}
    if point.index != NO_INDEX:
        section["retrieval"] = {"embedding": "x", **INDEXES[point.index]}
        section["sampling"] = {"weights": "retrieved", "retrieved_share": 0.5, "queries": point.candidates}
    return section


def batch_of(point: Point, first: int, rows: int) -> dict[str, Tensor]:
    """Rows of the given size, by number from `first` on: their labels go round the partitions."""
    numbers = torch.arange(first, first + rows)
    width = point.row_bytes - LABEL_BYTES
    batch = {"x": torch.zeros(rows, width, dtype=torch.uint8), "label": numbers % point.partitions}
    if point.index != NO_INDEX:
        batch["x"] = torch.randn(rows, width // 4, generator=torch.Generator().manual_seed(first))
    if point.policy == "score":
        batch["score"] = torch.rand(rows, generator=torch.Generator().manual_seed(first))
    if point.policy == "herding":
        batch["score"] = torch.rand(rows, 8, generator=torch.Generator().manual_seed(first))
    return batch


def run(point: Point, steps: int, blocks: int) -> list[tuple[float, ...]]:
    """One rank of a job: microseconds a step of the training thread and of all others, and a control, by block."""
    with tempfile.TemporaryDirectory() as folder, Rehearsal(section_of(point, folder)) as rehearsal:
        at_once = max(1, AT_ONCE // point.row_bytes)
        for first in range(0, point.rows, at_once):
            rehearsal.update(batch_of(point, first, min(at_once, point.rows - first)))
        count = min(16, max(1, AT_ONCE // (point.row_bytes * point.candidates)))
        firsts = (point.rows + number * point.candidates for number in range(count))
        micro_batches = cycle([batch_of(point, first, point.candidates) for first in firsts])

        def step() -> None:
            for _ in range(point.micro_batches):
                rehearsal.augment(next(micro_batches))
            rehearsal.step()

        for _ in range(steps):
            step()
        control = _training_step() if point.pause_ms else lambda: None

        def block() -> tuple[float, ...]:
            shares = _block(step, rehearsal.drain, steps, point.pause_ms)
            return *shares, _block(control, lambda: None, steps, point.pause_ms)[0]

        return [block() for _ in range(blocks)]


def _training_step() -> Callable[[], None]:
    """A training step of a tiny model without rehearsal, which was made once."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs, labels = torch.randn(8, 64), torch.arange(8)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()
    return step


def _block(step: Callable[[], None], drain: Callable[[], None], steps: int, pause_ms: int) -> tuple[float, float]:
    """Microseconds a step of this thread and of all others; `drain` waits for these."""
    thread = everything = 0.0
    for _ in range(steps):
        drain()  # so that all of a step is counted, and nothing of the one before
        if dist.is_initialized():
            dist.barrier()
        time.sleep(1e-3 * pause_ms)
        start, all_start = time.thread_time(), time.process_time()
        step()
        thread += time.thread_time() - start
        drain()
        everything += time.process_time() - all_start
    return 1e6 * thread / steps, 1e6 * (everything - thread) / steps


def measure(point: Point, steps: int, blocks: int) -> dict[str, Any]:
    """A row of the report: the median over the blocks, and over the ranks."""
    ranks = on_ranks(partial(_on_rank, steps=steps, blocks=blocks), point.ranks, point)
    columns = list(zip(*(block for rank in ranks for block in rank), strict=True))
    training, background, control = (statistics.median(column) for column in columns)
    row = {**asdict(point), "training_us": training, "background_us": background}
    return row | {"control_us": control} if point.pause_ms else row


def _on_rank(point: Point, *, steps: int, blocks: int) -> list[tuple[float, ...]]:
    torch.set_num_threads(1)
    return run(point, steps, blocks)


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """By which power of the value the cost grows at the end: the slope of the last two points on both log scales."""
    return math.log(costs[-1] / costs[-2]) / math.log(values[-1] / values[-2]) if len(values) > 1 else 0.0


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What the plain loop pays, and the exponents of all numbers, of training thread and background together."""
    by_axis: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_axis.setdefault(row["axis"], []).append(row)
    loop = by_axis.pop("loop", [])
    by_axis.pop("pause_ms", None)  # a step does no more behind a longer one
    paid = {
        name: 1e-3 * row[of]
        for row in loop
        for name, of in (("paid_ms_loop", "training_us"), ("background_ms_loop", "background_us"))
    }
    summary = {
        f"exponent_{axis}": exponent(
            [row[axis] for row in line], [row["training_us"] + row["background_us"] for row in line]
        )
        for axis, line in by_axis.items()
        if not isinstance(line[0][axis], str)
    }
    nearest = {row["index"]: row["training_us"] + row["background_us"] for row in by_axis.get("index", [])}
    if len(nearest) > 1:
        drawn = nearest.pop(NO_INDEX)
        paid["retrieved_ms"] = 1e-3 * (min(nearest.values()) - drawn)
    return {**paid, "exponent_max": max(summary.values()), **summary} if summary else paid


def main(argv: Sequence[str]) -> int:
    """Measures every point and prints the summary."""
    arguments = arguments_of("How a step grows.", argv, **SETTINGS)
    rows = [{"axis": "loop", **measure(LOOP, arguments.steps, arguments.blocks)}]
    for axis in AXES:
        if axis == "index" and find_spec("faiss") is None:
            print("index: left out, as faiss-cpu is not installed")
            continue
        for point in points(axis, arguments.largest):
            row = {"axis": axis, **measure(point, arguments.steps, arguments.blocks)}
            told = f"{row['training_us']:.0f} us of the training thread, {row['background_us']:.0f} us of others"
            print(f"{axis} {getattr(point, axis)}: {told}", flush=True)
            rows.append(row)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    publish(arguments.json, {**summarise(rows), **settings}, rows, ranks=max(row["ranks"] for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
