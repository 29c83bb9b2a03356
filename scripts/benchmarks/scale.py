"""Model of the exchange on clusters of 8 to 16,384 GPUs, held against 2 to 16 real ranks.

    python -m scripts.benchmarks.scale --json docs/results/bench_scale.json

The model is that of `rehearsal plan` (`rehearsal_plugin/runtime/cost_model.py`). Its figures for this machine are
fitted to steps of 2, 4 and 8 real ranks on gloo, and foretell those of 16. Its figures for clusters are published ones.
128 ranks as threads of one process run the real code, to see that the draw stays uniform.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from rehearsal_plugin.runtime.cost_model import COPY_GB_S, DRAW_NS, LINKS, Links, Load, busiest_rows, times
from scripts.benchmarks.exchange import drawing
from scripts.benchmarks.measure import arguments_of, measure, publish
from scripts.benchmarks.process_ranks import Job, on_ranks, run_steps
from scripts.benchmarks.thread_ranks import replayed_ids, rows_of

__all__ = ["check_threads", "fit", "main", "model_rows", "predicted_ms", "validation"]

GPUS = tuple(1 << power for power in range(3, 15))
RANKS = (2, 4, 8, 16)
SIZES = (1 << 10, 32 << 10, 147 << 10)
HEADER_BYTES, BY_PARTITION_BYTES = 80, 192  # of up to 8 partitions that change in a step
LOADS = {
    "2,048 tokens and labels, r = 8 of 40": Load(32, 8, 32 << 10, HEADER_BYTES, 2),
    "2,048 tokens and labels, by partition": Load(32, 8, 32 << 10, BY_PARTITION_BYTES, 2),
    "3 x 224 x 224 bytes, r = 7 of 63": Load(56, 7, 147 << 10, HEADER_BYTES, 2),
}


def main(argv: Sequence[str]) -> int:
    """Measures, fits, foretells, and prints the summary."""
    arguments = arguments_of(
        "When the exchange stays hidden.", argv, ranks=max(RANKS), steps=40, passes=3, threads=128, draws=20, rounds=51
    )
    measured = steps_of([size for size in RANKS if size <= arguments.ranks], arguments.steps, arguments.passes)
    draw_ns, copy_gb_s = draw_cost(arguments.rounds), copy_rate(arguments.rounds)
    held_out = max(size for size, _ in measured)
    known = {key: value for key, value in measured.items() if key[0] < held_out}
    links = fit(known or measured)
    checked = validation(measured, links, held_out)
    threads = check_threads(arguments.threads, arguments.draws)
    scale = model_rows()
    worst = [row for row in scale if row["gpus"] == GPUS[-1] and row["links"] == "h100-ndr"]
    summary = {
        "foretold_over_measured_low": min(row["ratio"] for row in checked if row["held_out"]),
        "foretold_over_measured_high": max(row["ratio"] for row in checked if row["held_out"]),
        "background_ms_16384": max(row["total"] for row in worst),
        "draw_ns_a_row": draw_ns,
        "copy_gb_s": copy_gb_s,
        "threads_chi_square_z": threads["z"],
    }
    here: dict[str, Any] = {
        "kind": "fit",
        "base_us": links.base_us,
        "hop_us": links.hop_us,
        "gb_s": links.gb_s,
        "cores": cores(),
    }
    publish(arguments.json, summary, [here, *checked, *scale, threads], ranks=held_out)
    return 0


def steps_of(ranks: Sequence[int], steps: int, passes: int = 1) -> dict[tuple[int, int], float]:
    """Milliseconds of a step that does nothing but the exchange, by ranks and bytes a row.

    Medians over the steps of all ranks. All jobs are run `passes` times by turns, as other work on the machine comes
    and goes, and the pass that it disturbed least counts: the model knows of no other work.
    """
    medians_ms: dict[tuple[int, int], list[float]] = {}
    for size, row_bytes in list(product(ranks, SIZES)) * passes:
        seconds = [second for one in on_ranks(run_steps, size, Job(row_bytes, steps=steps)) for second in one.step_s]
        medians_ms.setdefault((size, row_bytes), []).append(1e3 * statistics.median(seconds))
        print(f"{size} ranks, rows of {row_bytes} bytes: {medians_ms[size, row_bytes][-1]:.3g} ms a step", flush=True)
    return {key: min(medians) for key, medians in medians_ms.items()}


def load_here(row_bytes: int) -> Load:
    """Load of a rank in a `Job`."""
    return Load(8, 8, row_bytes, HEADER_BYTES, 2)


def fit(measured: dict[tuple[int, int], float]) -> Links:
    """The figures of this machine that come closest to the measured steps, by relative error."""
    columns, target = [], []
    for (ranks, row_bytes), step_ms in measured.items():
        crowd = max(1.0, ranks / cores())
        rows = max(busiest_rows(ranks, 8), crowd * 8) * (ranks - 1) / ranks
        moved = crowd * ranks * HEADER_BYTES + rows * row_bytes
        columns.append([2 * crowd / 1e3, 2 * crowd * (ranks - 1) / 1e3, moved / 1e6])
        target.append(step_ms)
    weights = 1 / np.array(target)
    solution = np.linalg.lstsq(np.array(columns) * weights[:, None], np.ones(len(target)), rcond=None)[0]
    base_us, hop_us, ms_a_mb = np.maximum(solution, 1e-6).tolist()
    rate = 1 / ms_a_mb
    return Links(max(RANKS), base_us, hop_us, hop_us, hop_us, rate, rate, cores=cores(), source="fitted")


def predicted_ms(links: Links, ranks: int, row_bytes: int) -> float:
    """The step of a job that does nothing but the exchange; the fit has draw and copies in it."""
    parts = times(load_here(row_bytes), ranks, links, draw_ns=0.0, copy_gb_s=float("inf"))
    return parts.headers + parts.rows


def validation(measured: dict[tuple[int, int], float], links: Links, held_out: int) -> list[dict[str, Any]]:
    """The model beside every measured step; `held_out` ranks took no part in the fit."""
    rows: list[dict[str, Any]] = []
    for (ranks, row_bytes), step_ms in measured.items():
        foretold = predicted_ms(links, ranks, row_bytes)
        size = {"kind": "validation", "ranks": ranks, "bytes_a_row": row_bytes}
        ends = {"measured_ms": step_ms, "foretold_ms": foretold, "ratio": foretold / step_ms}
        rows.append({**size, **ends, "held_out": ranks == held_out})
    return rows


def model_rows() -> list[dict[str, Any]]:
    """Milliseconds of the background for all loads, links and sizes."""
    rows: list[dict[str, Any]] = []
    for name, load in LOADS.items():
        for link, links in LINKS.items():
            for gpus in GPUS:
                taken = times(load, gpus, links, draw_ns=DRAW_NS, copy_gb_s=COPY_GB_S)
                parts = {"headers": taken.headers, "draw": taken.draw, "copies": taken.copies, "rows": taken.rows}
                place: dict[str, Any] = {"kind": "model", "load": name, "links": link, "gpus": gpus}
                rows.append({**place, **parts, "total": taken.total, "busiest": busiest_rows(gpus, load.replayed)})
    return rows


def draw_cost(rounds: int) -> float:
    """Nanoseconds of CPU time for each row of a draw, for the largest cluster."""
    timing = measure({"draw": drawing(GPUS[-1])}, rounds, warmup=2)["draw"]
    return 1e9 * timing.cpu_median_s / drawing(GPUS[-1])().moved


def copy_rate(rounds: int, row_bytes: int = 16 << 10) -> float:
    """GB/s of CPU time at which rows are gathered from a buffer that is larger than the caches."""
    torch.set_num_threads(1)
    rows = torch.ones(1 << 14, row_bytes, dtype=torch.uint8)
    out = torch.empty(64, row_bytes, dtype=torch.uint8)
    timing = measure({"copy": lambda: torch.index_select(rows, 0, torch.randint(len(rows), (64,)), out=out)}, rounds)
    return out.numel() / timing["copy"].cpu_median_s / 1e9


def check_threads(ranks: int, steps: int) -> dict[str, Any]:
    """Uniformity of replay on `ranks` ranks as threads, as a standard score of Pearson's statistic.

    In draws without replacement rows exclude each other, so the statistic is scaled by (n - 1) / (n - r).
    """
    ids, metrics = replayed_ids(ranks, steps, representatives=8)
    stored = torch.tensor([4 * rank + i for rank in range(ranks) for i in range(rows_of(rank))])
    counts = torch.bincount(ids.flatten(), minlength=4 * ranks)[stored].double()
    expected, n = ids.numel() / len(stored), len(stored)
    statistic = float(((counts - expected) ** 2).sum() / expected) * (n - 1) / (n - 8)
    return {
        "kind": "threads",
        "ranks": ranks,
        "rows_stored": n,
        "rows_replayed": ids.numel(),
        "collectives_a_step": metrics["collectives"] / metrics["steps"],
        "z": (statistic - (n - 1)) / (2 * (n - 1)) ** 0.5,
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
