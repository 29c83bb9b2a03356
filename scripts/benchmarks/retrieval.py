"""Searches over the rows of all ranks: exact or not, how near IVF and HNSW come, and their time beside faiss alone.

    python -m scripts.benchmarks.retrieval --json out/bench_retrieval
    python -m scripts.benchmarks.retrieval --rows 4000 --rounds 3        # a small one

faiss alone is one `IndexFlatIP` over as many rows, in one process with as many threads as there are ranks; it gives
numbers of rows, whereas the search over ranks also brings the rows themselves. Both take turns within a round. The rows
lie around 1,000 centres, as embeddings of texts do; IVF and HNSW have the settings of the defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.retrieval import Retrieved, Retriever
from scripts.benchmarks.measure import arguments_of, measure, publish, ratio
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
    """Agreement of the exact search with brute force, and its time beside faiss alone; of use on rank 0."""
    import faiss
    import torch.distributed as dist

    rank, rows = dist.get_rank(), arguments.rows
    alone, every, queries = None, None, vectors_of(-1, arguments.queries, arguments.width)
    if rank == 0:
        every = np.concatenate([part(rows, other, arguments) for other in range(arguments.ranks)])
        alone = faiss.IndexFlatIP(arguments.width)
        alone.add(every)

    def faiss_alone() -> None:
        dist.barrier()
        if alone is not None:
            faiss.omp_set_num_threads(arguments.ranks)
            alone.search(queries, arguments.k)
            faiss.omp_set_num_threads(1)
        dist.barrier()

    with Retriever(buffer_of(part(rows, rank, arguments), rank), settings("flat")) as retriever:
        queries_of_rank = np.array_split(queries, arguments.ranks)[rank]

        def over_ranks() -> Retrieved:
            dist.barrier()
            return retriever.search(queries_of_rank, arguments.k)

        def nothing() -> None:
            dist.barrier()
            dist.barrier()

        timings = measure({"over_ranks": over_ranks, "faiss_alone": faiss_alone, "barriers": nothing}, arguments.rounds)
        nearest = together(over_ranks())
    if every is None:
        return {}, []
    agreement = float((nearest == brute_force(queries, every, arguments)).all(axis=1).mean())
    beside = ratio(timings["over_ranks"], timings["faiss_alone"])
    print(f"over ranks / faiss alone: {beside.text()}")
    for name, timing in timings.items():
        print(f"{name}: {timing.text()}")
    summary = {"exact_agreement": agreement, "time_vs_faiss": beside.median}
    spread = {"time_vs_faiss_low": beside.low, "time_vs_faiss_high": beside.high}
    return summary | spread, [{"what": name, **timing.row()} for name, timing in timings.items()]


def recall(kind: str, arguments: Any) -> float:
    """Share of the true nearest rows of all ranks that an index finds; of use on rank 0."""
    import torch.distributed as dist

    rank, rows = dist.get_rank(), arguments.near_rows
    queries = vectors_of(-1, arguments.queries, arguments.width)
    with Retriever(buffer_of(part(rows, rank, arguments), rank), settings(kind)) as retriever:
        nearest = together(retriever.search(np.array_split(queries, arguments.ranks)[rank], arguments.k))
    every = np.concatenate([part(rows, other, arguments) for other in range(arguments.ranks)])
    true = brute_force(queries, every, arguments)
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
