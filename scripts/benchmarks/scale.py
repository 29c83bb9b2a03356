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
from scipy.optimize import nnls

from rehearsal_plugin.distributed.header import FIXED, WORD_BYTES
from rehearsal_plugin.distributed.header_schedule import LONGEST
from rehearsal_plugin.runtime.cost_model import (
    COPY_GB_S,
    DRAW_RANK_BY_PARTITION_NS,
    DRAW_RANK_NS,
    DRAW_US,
    LINKS,
    Links,
    Load,
    header_ms,
    times,
)
from scripts.benchmarks.exchange import drawing
from scripts.benchmarks.measure import arguments_of, measure, publish
from scripts.benchmarks.process_ranks import Job, on_ranks, run_steps
from scripts.benchmarks.thread_ranks import replayed_ids, rows_of

__all__ = ["check_threads", "fit", "main", "model_rows", "predicted_ms", "validation"]

GPUS = tuple(1 << power for power in range(3, 15))
RANKS = (2, 4, 8, 16)
SIZES = (1 << 10, 32 << 10, 147 << 10)
HEADER_BYTES, BY_PARTITION_BYTES = WORD_BYTES * (FIXED + 2), WORD_BYTES * (FIXED + 16)  # of 8 changes in a step
GROUP = 64
REPRESENTATIVES = 8
LOADS = {
    "2,048 tokens and labels, r = 8 of 40": Load(32, 8, 32 << 10, HEADER_BYTES, 1),
    f"2,048 tokens and labels, groups of {GROUP}": Load(32, 8, 32 << 10, HEADER_BYTES, 1, group=GROUP),
    "2,048 tokens and labels, by partition": Load(32, 8, 32 << 10, BY_PARTITION_BYTES, 1, 1),
    f"2,048 tokens and labels, by partition, groups of {GROUP}": Load(
        32, 8, 32 << 10, BY_PARTITION_BYTES, 1, 1, group=GROUP
    ),
    "3 x 224 x 224 bytes, r = 7 of 63": Load(56, 7, 147 << 10, HEADER_BYTES, 1),
}


def main(argv: Sequence[str]) -> int:
    """Measures, fits, foretells, and prints the summary."""
    arguments = arguments_of(
        "When the exchange stays hidden.",
        argv,
        ranks=max(RANKS),
        steps=LONGEST,
        passes=3,
        threads=128,
        draws=20,
        rounds=51,
    )
    measured = steps_of([size for size in RANKS if size <= arguments.ranks], arguments.steps, arguments.passes)
    (draw_us, rank_ns), copy_gb_s = draw_cost(arguments.rounds), copy_rate(arguments.rounds)
    held_out = max(size for size, _ in measured)
    known = {key: value for key, value in measured.items() if key[0] < held_out}
    links = fit(known or measured)
    checked = validation(measured, links, held_out)
    threads = [check_threads(arguments.threads, arguments.draws, scope) for scope in ("global", GROUP // 4)]
    scale = model_rows()
    name, grouped, *_ = LOADS
    at_most = {row["load"]: row for row in scale if row["gpus"] == GPUS[-1] and row["links"] == "h100-ndr"}
    foretold = [row["ratio"] for row in checked if row["held_out"]]
    summary = {
        "background_ms_16384_group": at_most[grouped]["total"],
        "background_ms_16384_global": at_most[name]["total"],
        "background_ms_16384_global_with_headers": at_most[name]["with_headers"],
        "foretold_error_max": max(max(ratio, 1 / ratio) for ratio in foretold),
        "uniform_z": threads[0]["z"],
        "uniform_z_groups": threads[1]["z"],
        "draw_us": draw_us,
        "draw_rank_ns": rank_ns,
        "copy_gb_s": copy_gb_s,
    }
    here: dict[str, Any] = {
        "kind": "fit",
        "base_us": links.base_us,
        "hop_us": links.hop_us,
        "gb_s": links.gb_s,
        "cores": cores(),
    }
    publish(arguments.json, summary, [here, *checked, *scale, *threads], ranks=held_out)
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
    return Load(8, 8, row_bytes, HEADER_BYTES, 1)


def fit(measured: dict[tuple[int, int], float]) -> Links:
    """The figures of this machine that come closest to the measured steps, by relative error."""
    columns, target = [], []
    for (ranks, row_bytes), step_ms in measured.items():
        load, crowd = load_here(row_bytes), max(1.0, ranks / cores())
        hops = (ranks - 1) / LONGEST + load.messages(ranks)
        moved = ranks * HEADER_BYTES / LONGEST + load.replayed * (ranks - 1) / ranks * row_bytes
        columns.append([crowd * (1 + 1 / LONGEST) / 1e3, crowd * hops / 1e3, crowd * moved / 1e6])
        target.append(step_ms)
    weights = 1 / np.array(target)
    solution, _ = nnls(np.array(columns) * weights[:, None], np.ones(len(target)))
    base_us, hop_us, ms_a_mb = np.maximum(solution, 1e-6).tolist()
    rate = 1 / ms_a_mb
    return Links(max(RANKS), base_us, hop_us, hop_us, hop_us, rate, rate, cores=cores(), source="fitted")


def predicted_ms(links: Links, ranks: int, row_bytes: int) -> float:
    """The step of a job that does nothing but the exchange; the fit has draw and copies in it."""
    parts = times(load_here(row_bytes), ranks, links, draw_us=0.0, rank_ns=0.0, copy_gb_s=float("inf"))
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
    """Milliseconds of the background for all loads, links and sizes: in the mean, and in a step with headers."""
    rows: list[dict[str, Any]] = []
    for name, load in LOADS.items():
        rank_ns = DRAW_RANK_NS if load.header_every > 1 else DRAW_RANK_BY_PARTITION_NS
        for link, links in LINKS.items():
            for gpus in GPUS:
                taken = times(load, gpus, links, draw_us=DRAW_US, rank_ns=rank_ns, copy_gb_s=COPY_GB_S)
                parts = {"headers": taken.headers, "draw": taken.draw, "copies": taken.copies, "rows": taken.rows}
                place: dict[str, Any] = {"kind": "model", "load": name, "links": link, "gpus": gpus}
                peak = taken.total - taken.headers + header_ms(load, gpus, links)
                ends = {"total": taken.total, "with_headers": peak, "messages": load.messages(gpus)}
                rows.append({**place, **parts, **ends})
    return rows


def draw_cost(rounds: int) -> tuple[float, float]:
    """CPU time of a draw: microseconds for few ranks, and nanoseconds more for each rank of the largest cluster."""
    few, many = (measure({"draw": drawing(ranks)}, rounds, warmup=2)["draw"].cpu_median_s for ranks in (8, GPUS[-1]))
    return 1e6 * few, 1e9 * (many - few) / (GPUS[-1] - 8)


def copy_rate(rounds: int, row_bytes: int = 16 << 10) -> float:
    """GB/s of CPU time at which rows are gathered from a buffer that is larger than the caches."""
    torch.set_num_threads(1)
    rows = torch.ones(1 << 14, row_bytes, dtype=torch.uint8)
    out = torch.empty(64, row_bytes, dtype=torch.uint8)
    timing = measure({"copy": lambda: torch.index_select(rows, 0, torch.randint(len(rows), (64,)), out=out)}, rounds)
    return out.numel() / timing["copy"].cpu_median_s / 1e9


def check_threads(ranks: int, steps: int, scope: int | str) -> dict[str, Any]:
    """Uniformity of replay on `ranks` ranks as threads, as a standard score of Pearson's statistic.

    A step takes rows of each rank in proportion to what it holds, nearly to the row. So each row is compared with the
    mean of its rank, and the ranks with what they hold. A reader gets no row twice, so of n rows of which it gets m the
    statistic expects n - m; m is 1, and more by the chance of each of its other rows to be of the same rank.
    """
    ids, metrics = replayed_ids(ranks, steps, REPRESENTATIVES, sampling={"scope": scope})
    held = torch.tensor([rows_of(rank) for rank in range(ranks)])
    counts = torch.bincount(ids, minlength=4 * ranks).reshape(ranks, 4).double()
    by_rank, n = counts.sum(1), int(held.sum())
    expected = by_rank / held
    is_stored = torch.arange(4) < held[:, None]
    statistic = float((((counts - expected[:, None]) ** 2) / expected[:, None])[is_stored].sum())
    size = ranks if scope == "global" else int(scope)
    of_group = torch.bincount(torch.arange(ranks) % (ranks // size), held.double())[
        torch.arange(ranks) % (ranks // size)
    ]
    together = 1 + held * (REPRESENTATIVES * ranks / (n * size) - 1 / of_group)
    freedom = float((held - together).clamp(min=0).sum())
    return {
        "kind": "threads",
        "scope": str(scope),
        "ranks": ranks,
        "rows_stored": n,
        "rank_off_by": float((by_rank / len(ids) * n / held - 1).abs().max()),
        "rows_replayed": ids.numel(),
        "collectives_a_step": metrics["collectives"] / metrics["steps"],
        "z": (statistic - freedom) / (2 * freedom) ** 0.5,
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
