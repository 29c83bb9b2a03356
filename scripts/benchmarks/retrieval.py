"""Searches over the rows of all ranks: exact or not, how near IVF and HNSW come, and their time beside faiss alone.

    python -m scripts.benchmarks.retrieval --json out/bench_retrieval
    python -m scripts.benchmarks.retrieval --rows 4000 --rounds 3        # a small one

faiss alone is one `IndexFlatIP` over as many rows, in one process with as many threads as there are ranks; it gives
numbers of rows, whereas the search over ranks also brings the rows themselves. Both take turns within a round. The rows
lie around 1,000 centres, as embeddings of texts do; IVF and HNSW have the settings of the defaults.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.retrieval import Retrieved, Retriever
from scripts.benchmarks.measure import Timing, arguments_of, measure, publish, ratio
from scripts.common.launch import is_rank, launch
from scripts.common.process_group import leave_together

CENTRES, NOISE = 1000, 0.6

Vectors = NDArray[np.float32]


def main(argv: Sequence[str]) -> int:
    """Runs one rank where a launcher started this process, else starts the launcher; returns the exit status."""
    numbers = {"ranks": 2, "rows": 100_000, "near_rows": 20_000, "width": 384, "queries": 64, "k": 10, "rounds": 21}
    arguments = arguments_of((__doc__ or "").partition("\n")[0], argv, **numbers)
    if not is_rank():
        return launch("scripts.benchmarks.retrieval", arguments.ranks, argv)
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    summary, rows = exact(arguments)
    for kind in ("ivf", "hnsw"):
        summary[f"recall_{kind}"] = recall(kind, arguments)
    if dist.get_rank() == 0:
        publish(arguments.json, summary, rows, ranks=arguments.ranks)
    leave_together()
    return 0


def exact(arguments: Any) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Agreement of the exact search with brute force, and its time beside faiss alone; empty on other ranks than 0."""
    import torch.distributed as dist

    rank, queries = dist.get_rank(), vectors_of(-1, arguments.queries, arguments.width)
    every = all_rows(arguments.rows, arguments) if rank == 0 else None
    own = buffer_of(part(arguments.rows, rank, arguments), rank)
    before = resident()
    with Retriever(own, settings("flat")) as retriever:
        over_ranks = partial(search_over_ranks, retriever, queries, arguments)
        over_ranks()  # makes the index
        held = resident() - before
        alternatives: dict[str, Callable[[], object]] = {
            "over_ranks": over_ranks,
            "faiss_alone": faiss_alone(every, queries, arguments),
            "barriers": lambda: (dist.barrier(), dist.barrier()),
        }
        timings = measure(alternatives, arguments.rounds)
        nearest = together(over_ranks())
    if every is None:
        return {}, []
    agreement = float((nearest == brute_force(queries, every, arguments)).all(axis=1).mean())
    size = {"rows": float(arguments.rows), "index_bytes_a_row": held / len(own)}
    return {"exact_agreement": agreement, **compared(timings), **size}, [
        {"what": name, **timing.row()} for name, timing in timings.items()
    ]


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def search_over_ranks(retriever: Retriever, queries: Vectors, arguments: Any) -> Retrieved:
    """The search that is measured: each rank asks its share of the queries, all of them begin together."""
    import torch.distributed as dist

    dist.barrier()
    return retriever.search(np.array_split(queries, arguments.ranks)[dist.get_rank()], arguments.k)


def faiss_alone(every: Vectors | None, queries: Vectors, arguments: Any) -> Callable[[], None]:
    """The same search by faiss in one process, with a thread a rank; the ranks without the rows wait."""
    import faiss
    import torch.distributed as dist

    index = None
    if every is not None:
        index = faiss.IndexFlatIP(arguments.width)
        index.add(every)

    def search() -> None:
        dist.barrier()
        if index is not None:
            faiss.omp_set_num_threads(arguments.ranks)
            index.search(queries, arguments.k)
            faiss.omp_set_num_threads(1)
        dist.barrier()

    return search


def compared(timings: Mapping[str, Timing]) -> dict[str, float]:
    """The time over ranks as a multiple of that of faiss alone; prints all timings."""
    beside = ratio(timings["over_ranks"], timings["faiss_alone"])
    print(f"over ranks / faiss alone: {beside.text()}")
    for name, timing in timings.items():
        print(f"{name}: {timing.text()}")
    return {"time_vs_faiss": beside.median, "time_vs_faiss_low": beside.low, "time_vs_faiss_high": beside.high}


def recall(kind: str, arguments: Any) -> float:
    """Share of the true nearest rows of all ranks that an index finds; of use on rank 0."""
    import torch.distributed as dist

    rank, rows = dist.get_rank(), arguments.near_rows
    queries = vectors_of(-1, arguments.queries, arguments.width)
    with Retriever(buffer_of(part(rows, rank, arguments), rank), settings(kind)) as retriever:
        nearest = together(search_over_ranks(retriever, queries, arguments))
    true = brute_force(queries, all_rows(rows, arguments), arguments)
    return float(np.mean([np.isin(one, other).mean() for one, other in zip(true, nearest, strict=True)]))


def settings(kind: str) -> dict[str, Any]:
    """The section `rehearsal.retrieval`: defaults but for the index, which is used for few rows, too."""
    return {"embedding": "embedding", "metric": "inner_product", "index": kind, "exact_below": 0}


def vectors_of(seed: int, count: int, width: int) -> Vectors:
    """Vectors around centres that all seeds share."""
    centres = np.random.default_rng(1).standard_normal((CENTRES, width), dtype=np.float32)
    rng = np.random.default_rng(seed + 100)
    noise = rng.standard_normal((count, width), dtype=np.float32)
    return np.asarray(centres[rng.integers(0, CENTRES, count)] + NOISE * noise)


def part(rows: int, rank: int, arguments: Any) -> Vectors:
    """The part of a rank in `rows` rows of all ranks."""
    return vectors_of(rank, len(np.array_split(np.empty(rows), arguments.ranks)[rank]), arguments.width)


def all_rows(rows: int, arguments: Any) -> Vectors:
    """The rows of all ranks, one rank's after the other's."""
    return np.concatenate([part(rows, rank, arguments) for rank in range(arguments.ranks)])


def buffer_of(vectors: Vectors, rank: int) -> RehearsalBuffer:
    """A buffer with a row for each vector, at the slot of its number."""
    batch = {"id": torch.arange(len(vectors)), "embedding": torch.from_numpy(vectors)}
    buffer = RehearsalBuffer(BufferConfig(capacity=len(vectors)), RowLayout.infer(batch), rank=rank)
    buffer.offer(batch)
    return buffer


def together(nearest: Retrieved) -> NDArray[np.int64]:
    """Results of all ranks, `[queries, k]`: numbers of rows, the ranks' one after the other."""
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (nearest.rank, nearest.slot, nearest.fields()["id"].numpy()))
    ranks, slots, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not np.array_equal(slots, ids):
        raise RuntimeError("a row came that is not the one at its slot")
    return np.asarray(ranks * (1 << 32) + slots)


def brute_force(queries: Vectors, every: Vectors, arguments: Any) -> NDArray[np.int64]:
    """The nearest of all rows by definition, in double precision, numbered as by `together`."""
    scores = np.concatenate(
        [queries.astype(np.float64) @ block.astype(np.float64).T for block in np.array_split(every, 20)], axis=1
    )
    places = np.argsort(-scores, axis=1, kind="stable")[:, : arguments.k]
    sizes = [len(rows) for rows in np.array_split(np.empty(len(every)), arguments.ranks)]
    rank = np.repeat(np.arange(arguments.ranks), sizes)[places]
    return np.asarray(rank * (1 << 32) + places - np.concatenate(([0], np.cumsum(sizes)))[rank])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
