"""Bytes and messages of the exchange, counted, and the time of the draw.

    python -m scripts.benchmarks.exchange --json docs/results/bench_exchange.json

2 to 16 real ranks on gloo run the real code. The bytes of a rank are those that the kernel counts on the connections of
the exchange, so the headers and what gloo itself adds are among them. Every rank asks for 8 rows a step. Buffers are
full, and the steps counted are as many as lie between two headers. The draw of one rank of a large job is timed by the
CPU time of its thread, beside the clock.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np

from rehearsal_plugin.distributed.draw import Numbers, Plan, draw, plan
from rehearsal_plugin.distributed.header_schedule import LONGEST
from scripts.benchmarks.measure import Timing, arguments_of, measure, publish
from scripts.benchmarks.process_ranks import WARMUP, Job, Steps, on_ranks, run_steps
from scripts.benchmarks.thread_ranks import counted_messages

__all__ = ["counted", "main", "timed_draws"]

RANKS = (2, 4, 8, 16)
DRAWS = ((1024, 1), (16_384, 1), (16_384, 10), (16_384, 100))
"""Ranks and partitions of the draws that are timed."""
THREADS, GROUP = (64, 256), 16
"""Ranks as threads whose messages are counted, and how many draw from each other in groups."""
REPRESENTATIVES = 8
TOKENS = 2048 * 8
REFERENCE = "2,048 tokens and labels"
"""The rows that `bytes_ratio_max` is about: as int64, as a causal language model takes them."""

JOBS = {
    "1 KiB": Job(1024),
    "2,048 tokens": Job(TOKENS),
    REFERENCE: Job(2 * TOKENS),
    f"{REFERENCE}, drawn by partition": Job(2 * TOKENS, weights="balanced"),
    "image of 3 x 224 x 224 bytes": Job(3 * 224 * 224),
}


def main(argv: Sequence[str]) -> int:
    """Counts, times, and prints the summary."""
    arguments = arguments_of("Bytes and messages of the exchange.", argv, ranks=max(RANKS), steps=LONGEST, rounds=101)
    ranks = [size for size in RANKS if size <= arguments.ranks]
    rows: list[dict[str, Any]] = []
    for name, job in JOBS.items():
        job = Job(job.row_bytes, REPRESENTATIVES, arguments.steps, job.weights)
        rows += [{"rows": name, **counted(job, size)} for size in ranks]
        print(*rows[-len(ranks) :], sep="\n")
    summary: dict[str, float] = {
        "bytes_ratio_max": max(row["bytes_ratio"] for row in rows if row["rows"] == REFERENCE),
        "messages_per_rank_max": max(row["messages_max"] for row in rows if row["rows"] == REFERENCE),
        "collectives_per_step": max(row["collectives"] for row in rows),
    }
    scopes: tuple[int | str, ...] = ("global", GROUP)
    for size, scope in product(THREADS, scopes):
        rows.append({"rows": "threads", **counted_messages(size, REPRESENTATIVES, WARMUP, LONGEST, scope)})
        print(rows[-1])
    for (size, partitions), timing in timed_draws(DRAWS, arguments.rounds).items():
        rows.append({"rows": "draw", "ranks": size, "partitions": partitions, **timing.row()})
        by_partition = f"_{partitions}_partitions" if partitions > 1 else ""
        summary[f"draw_ms_{size}{by_partition}"] = 1e3 * timing.cpu_median_s
        summary[f"draw_wall_ms_{size}{by_partition}"] = 1e3 * timing.median_s
    publish(arguments.json, summary, rows, ranks=max(ranks))
    return 0


def counted(job: Job, ranks: int) -> dict[str, Any]:
    """Traffic of a rank in a step: means over the ranks, and over steps."""
    return as_row(job, on_ranks(run_steps, ranks, job))


def as_row(job: Job, measured: Sequence[Steps]) -> dict[str, Any]:
    """One line of the report; `bytes_ratio` is what left all processes against the rows among it."""
    names = ("collectives", "messages", "segments", "wire_bytes", "row_bytes")
    means = {name: statistics.fmean(getattr(rank, name) for rank in measured) for name in names}
    size = {"ranks": len(measured), "bytes_a_row": job.row_bytes, "representatives": job.representatives}
    most = max(rank.messages for rank in measured)
    return {**size, **means, "messages_max": most, "bytes_ratio": means["wire_bytes"] / means["row_bytes"]}


def timed_draws(draws: Sequence[tuple[int, int]], rounds: int) -> dict[tuple[int, int], Timing]:
    """One rank's draw out of the rows of all ranks, and its plan, by the numbers of ranks and of partitions."""
    return {which: measure({"draw": drawing(*which)}, rounds, warmup=5)["draw"] for which in draws}


def drawing(ranks: int, partitions: int = 1) -> Callable[[], Plan]:
    """A draw of 8 rows for each of `ranks` ranks from 1,000 rows of each, as many from every partition."""
    counts, requests = np.full((ranks, partitions), 1000 // partitions), np.full(ranks, REPRESENTATIVES)
    numbers = Numbers(np.random.default_rng(0), np.random.default_rng(1))
    return lambda: plan(draw(counts, requests, ranks // 2, numbers), ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
