"""Overhead of rehearsal in a step of a DeepSpeed job, on two ranks.

    python -m scripts.benchmarks.overhead --json out/bench_overhead

One DeepSpeed engine takes all turns, on the same batches: as it is, on b + r rows; once more so, the control, whose
ratio to the first tells what the machine alone makes of two that do the same; with rehearsal, on the first b of these
rows, to which r are replayed; and with rehearsal whose collectives are issued from the training thread
(`exchange.launch: inline`). A turn begins with a step that is not timed, so that the background of a step runs behind
the next one, as in a job. Ratios are those within a round, to each of the turns without rehearsal.

The model computes for at least `--step-ms` a step, and at least as much for each byte of a row as a ResNet-18 does for
each byte of an image; the largest rows once more for `--step-ms` only, which is less than that: *light*. On two busy
cores the smallest rows meet a model that computes for a tenth of `--step-ms`, too: *short*.

A machine that is shared changes its speed from second to second, by more than rehearsal costs. So a small product of
matrices is timed in every pass through the model's layers, and a step is told in units of it. On a GPU
(`DS_ACCELERATOR=cuda`) it goes by the clock alone.

Once on all cores, which two ranks keep busy where there are two; and once with the training threads of both ranks on
one core, and all threads of the plugin on the others: a core is free for the background then.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from scripts.benchmarks.measure import Ratio, arguments_of, measure, publish, ratio
from scripts.benchmarks.overhead_model import (
    RESNET_OPERATIONS,
    Gauge,
    Model,
    batch_of,
    calibrate,
    engine_of,
    operations_of,
    passes_of,
)
from scripts.benchmarks.overhead_sides import CLOCKS, PHASES, UNIT, Batch, CopyingSide, RehearsedSide, Side
from scripts.common.launch import is_rank, launch
from scripts.common.process_group import leave_together
from scripts.common.report import write_text
from scripts.common.tables import print_table

RANKS = 2
NEW, REPLAYED = 6, 2
"""Rows of a batch on a rank, b and r."""

PLAIN, CONTROL, THREAD, INLINE = SIDES = ("plain", "control", "thread", "inline")
ROW_BYTES = (16 << 10, 128 << 10, 1 << 20)

Measured: TypeAlias = dict[str, dict[str, Any]]
"""Figures of each side of a job: its turns by both clocks, phases and counts."""

STORED = 36
"""Rows of a buffer. `fifo` keeps every candidate: nobody writes more."""


@dataclass(frozen=True)
class Case:
    """One job.

    Attributes:
        row_bytes: Bytes of a row.
        light: Whether the model computes for `step_ms` only, however large rows are.
        free_core: Whether the plugin's threads have a core to themselves.
        rounds: Turns of each side.
        steps: Steps of a turn that are timed.
        step_ms: Least time that the model computes a step, on a core of its own.
        short: Whether this is the light model with the smallest rows.
    """

    row_bytes: int
    light: bool
    free_core: bool
    rounds: int
    steps: int
    step_ms: int
    short: bool = False


def main(argv: Sequence[str]) -> int:
    """Starts a job for every case, and sums up."""
    description = (__doc__ or "").partition("\n")[0]
    arguments = arguments_of(description, argv, rounds=32, steps=2, step_ms=200)
    places = (False, True) if len(os.sched_getaffinity(0)) > 1 else (False,)
    length = arguments.rounds, arguments.steps, arguments.step_ms
    rows = [row for free in places for case in cases(free, *length) for row in lines(case, run(case))]
    print_table("A step on rank 0", *table(rows))
    publish(arguments.json, summarise(rows), rows, ranks=RANKS)
    return 0


def cases(free_core: bool, rounds: int, steps: int, step_ms: int) -> Iterator[Case]:
    """All sizes of rows; the largest also with a light model, of which several steps take as long as one without.

    Where no core is free, the smallest ones also with one whose steps are a tenth as long.
    """
    *smaller, largest = ROW_BYTES
    for row_bytes in smaller:
        yield Case(row_bytes, False, free_core, rounds, steps, step_ms)
    yield Case(largest, False, free_core, -(-2 * rounds // 3), 1, step_ms)
    yield Case(largest, True, free_core, rounds, steps, step_ms)
    if not free_core:
        yield Case(ROW_BYTES[0], True, free_core, rounds, 10 * steps, step_ms // 10, short=True)


def run(case: Case) -> Measured:
    """Measure a case in a job of its own.

    Raises:
        SystemExit: The job failed; what it printed is above.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        status = launch("scripts.benchmarks.overhead", RANKS, [json.dumps(asdict(case)), str(path)])
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
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    on_cpu = get_accelerator().device_name() == "cpu"
    deepspeed.init_distributed("gloo" if on_cpu else None)
    gauge, batches = Gauge(on_cpu), [batch_of(NEW + REPLAYED, case.row_bytes) for _ in range(4)]
    passes = calibrate(case.step_ms, batches[0], gauge)
    if not case.light:
        passes = max(passes, passes_of(case.row_bytes, RESNET_OPERATIONS))
    engine = engine_of(Model(passes, gauge), NEW + REPLAYED)
    os.sched_setaffinity(0, background)  # threads that are started from here on stay there
    sides = sides_of(engine, gauge, batches, case.steps)
    for side in sides.values():
        side.settle()
    os.sched_setaffinity(0, training)
    measure(
        {name: side.turn for name, side in sides.items()}, case.rounds, warmup=0
    )  # for its turns; they time themselves
    if dist.get_rank() == 0:
        work = {"operations": operations_of(case.row_bytes, passes)}
        write_text(path, json.dumps({name: {**work, **side.figures()} for name, side in sides.items()}))
    for side in sides.values():
        side.close()
    leave_together()
    return 0


def cores(free: bool) -> tuple[set[int], set[int]]:
    """Cores of the training threads, and cores of the plugin's."""
    available = os.sched_getaffinity(0)
    return ({min(available)}, available - {min(available)}) if free else (available, available)


def sides_of(engine: Any, gauge: Gauge, batches: Sequence[Batch], steps: int) -> dict[str, Side]:
    """All sides by name; without rehearsal on whole batches, with it on the new rows of the same."""
    new = [(x[:NEW], label[:NEW]) for x, label in batches]
    plain, control = Side(engine, gauge, batches, steps), CopyingSide(engine, gauge, batches, steps, NEW)
    return {PLAIN: plain, CONTROL: control} | {
        name: RehearsedSide(engine, gauge, new, steps, section(name)) for name in (THREAD, INLINE)
    }


def section(launched: str) -> dict[str, Any]:
    """The `rehearsal` section."""
    return {
        "ratio": REPLAYED / (NEW + REPLAYED),
        "buffer": {"capacity": STORED, "policy": "fifo"},
        "exchange": {"launch": launched},
    }


def lines(case: Case, measured: Measured) -> Iterator[dict[str, Any]]:
    """Figures of each side: its turns against those without rehearsal of the same round, and means of a step."""
    for name, figures in measured.items():
        wall, cpu = (compared(measured, name, clock) for clock in CLOCKS)
        yield {
            **{key: value for key, value in asdict(case).items() if key != "step_ms"},
            "engine": name,
            "step_bytes": case.row_bytes * (NEW + REPLAYED),
            "step_ms": 1e3 * statistics.median(figures[CLOCKS[0]]) / case.steps,
            "raw_ratio": ratio(figures[CLOCKS[0]], measured[PLAIN][CLOCKS[0]]).median,
            "unit_ratio": ratio(figures[UNIT], measured[PLAIN][UNIT]).median,
            "ratio": wall.median,
            "ratio_low": wall.low,
            "ratio_high": wall.high,
            "cpu_ratio": cpu.median,
            "cpu_ratio_low": cpu.low,
            "cpu_ratio_high": cpu.high,
            **{key: value for key, value in figures.items() if key not in (*CLOCKS, UNIT)},
        }


def compared(measured: Measured, name: str, clock: str) -> Ratio:
    """The turns of a side to those without rehearsal of the same round: to both, of the control to the plain one."""
    bare = (PLAIN,) if name in (PLAIN, CONTROL) else (PLAIN, CONTROL)
    turns = len(bare) * in_units(measured[name], clock)
    return ratio(turns, [turn for one in bare for turn in in_units(measured[one], clock)])


def in_units(figures: Mapping[str, Any], clock: str) -> list[float]:
    """The turns of a side by a clock, each in units of the gauge meanwhile."""
    return [seconds / unit for seconds, unit in zip(figures[clock], figures[UNIT], strict=True)]


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """CPU time of the training thread, with the smallest rows and against bare copies, and the largest ratios.

    Ratios are those with a free core and on two busy ones; those of light models and of short steps stand apart.
    """
    summary = summarise_paid([row for row in rows if not row["free_core"] and not row["short"]])
    short = [row["ratio"] for row in rows if row["short"] and row["engine"] == THREAD]
    summary |= {"ratio_short_busy": max(short)} if short else {}
    for key, free, light in (
        ("ratio_busy", False, False),
        ("ratio_free_core", True, False),
        ("ratio_busy_light", False, True),
        ("ratio_free_core_light", True, True),
    ):
        for engine, name in ((THREAD, key), (INLINE, f"{key}_inline"), (CONTROL, f"{key}_control")):
            of_case = [row for row in rows if (row["free_core"], row["light"], row["short"]) == (free, light, False)]
            ratios = [row["ratio"] for row in of_case if row["engine"] == engine]
            if ratios:
                summary[name] = max(ratios)
    return summary


def summarise_paid(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the training thread pays with the smallest rows, and with the largest against two copies of their bytes."""
    paid = {(row["step_bytes"], row["light"]): row["paid_ms"] for row in rows if row["engine"] == THREAD}
    copies = {(row["step_bytes"], row["light"]): row["copies_ms"] for row in rows if row["engine"] == CONTROL}
    if not paid or not copies:
        return {}
    largest = max(copies)[0], False
    return {"paid_ms_small": paid[min(paid)], "paid_vs_copies_8mib": paid[largest] / copies[largest]}


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line for every side of every case."""
    header = ["MiB a step", "light", "free core", "engine", "ms", "ratio", "CPU ratio", *(name[:-3] for name in PHASES)]
    body = []
    for row in rows:
        spread = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        phases = [f"{row[name]:.2f}" if name in row else "" for name in PHASES]
        kind = ["short" if row["short"] else "yes" if row["light"] else "no", "yes" if row["free_core"] else "no"]
        start = [f"{row['step_bytes'] / 2**20:.2g}", *kind, row["engine"]]
        body.append([*start, f"{row['step_ms']:.1f}", spread, f"{row['cpu_ratio']:.3f}", *phases])
    return header, body


if __name__ == "__main__":
    sys.exit(job(sys.argv[1:]) if is_rank() else main(sys.argv[1:]))
