"""Writes to and gathers from a buffer, beside raw numpy, a contiguous copy, and other libraries' buffers.

    python -m scripts.benchmarks.buffer --json out/bench_buffer
    python -m scripts.benchmarks.buffer --peers --json out/bench_buffer     # and torchrl, cpprb, other patterns

W14 writes 14 rows to random places, G7 and G64 gather 7 and 64 random rows; drawing the places is part of all. The
buffer of this package is used through its public methods (`RehearsalBuffer.offer` with the policy `random_replace`, so
that every row is written, and `sample` into memory that is used again), from a batch of tensors to a batch of tensors.
Raw numpy begins and ends with packed rows: it is the bare copy. The contiguous copy does not even look for places.

A store is called in a loop while it is its turn, up to 100 times. With rows of tokens it is also called once a turn:
all others have been since, so that nothing of it is in the cache, as in a job, which calls it once a step.

Peers that are not installed are left out; `pip install torchrl tensordict cpprb` brings them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch

from rehearsal_plugin.buffer.buffer import RehearsalBuffer
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import BufferConfig
from scripts.benchmarks.measure import Timing, arguments_of, measure, publish
from scripts.benchmarks.stores import BASELINES, Batch, Store, installed_peers
from scripts.common.tables import print_table

OURS = "rehearsal_plugin"
WRITTEN, GATHERED = 14, (7, 64)
WHAT = (f"W{WRITTEN}", *(f"G{count}" for count in GATHERED))
COLD = {what: f"{what}, a single call" for what in WHAT}
TURN_BYTES = 16 << 20
ADMISSION, COPY = "admission", "contiguous copy"
PARTITIONS, EXEMPLARS = 10, 20

ADMISSIONS: dict[str, dict[str, Any]] = {
    "fifo": {},
    "random_replace": {},
    "reservoir": {},
    "balanced": {"partition_by": "label"},
    "score": {"score_by": "score"},
    "score, by partition": {"policy": "score", "score_by": "score", "partition_by": "label"},
    f"herding, {EXEMPLARS} rows a partition": {
        "policy": "herding",
        "score_by": "features",
        "partition_by": "label",
        "capacity": EXEMPLARS * PARTITIONS,
    },
}
"""Policies, and what of the config they need."""


@dataclass(frozen=True)
class Form:
    """Form of samples: shape and dtype of their fields."""

    fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(hash=False)

    def batch(self, rows: int) -> Batch:
        """Random samples."""
        return {name: torch.randint(0, 100, (rows, *shape)).to(dtype) for name, (shape, dtype) in self.fields.items()}

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        return RowLayout.infer(self.batch(1)).row_bytes


TOKENS = "tokens, 16 KB"
FORMS = {
    TOKENS: Form({"input_ids": ((1024,), torch.int64), "labels": ((1024,), torch.int64)}),
    "images, 602 KB": Form({"image": ((3, 224, 224), torch.float32), "label": ((), torch.int64)}),
    "small images, 3 KB": Form({"image": ((3, 32, 32), torch.uint8), "label": ((), torch.int64)}),
}


class Ours:
    """This package's buffer; see `Store`."""

    def __init__(self, rows: int, batch: Batch) -> None:
        config = BufferConfig(capacity=rows, policy="random_replace")
        self._buffer = RehearsalBuffer(config, RowLayout.infer(batch))
        while len(self._buffer) < rows:
            self._buffer.offer(batch)
        self._room = {count: self._buffer.room(count) for count in GATHERED}

    def write(self, batch: Batch) -> None:
        """See `Store`."""
        self._buffer.offer(batch)

    def gather(self, count: int) -> Any:
        """See `Store`."""
        return self._buffer.sample(count, out=self._room[count])


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes the report."""
    description = (__doc__ or "").partition("\n")[0]
    arguments = arguments_of(description, argv, rounds=101, store_mb=1000, peers=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    admitted = admissions(arguments.rounds)
    timings: dict[tuple[str, str, str], Timing] = {}
    for name in FORMS:
        for (store, what), timing in apart(name, arguments.peers, arguments.store_mb << 20, arguments.rounds).items():
            timings[name, store, what] = timing
    rows = [{"rows": name, "store": store, "what": what, **t.row()} for (name, store, what), t in timings.items()]
    rows += [{"rows": TOKENS, "store": policy, "what": ADMISSION, **t.row()} for policy, t in admitted.items()]
    print_table("Microseconds a call (median)", *table(timings))
    print_table("Admission of 14 rows", ["policy", "us"], [[k, f"{1e6 * t.median_s:.1f}"] for k, t in admitted.items()])
    publish(arguments.json, summarise(rows), rows, ranks=1)
    return 0


def apart(name: str, peers: bool, nbytes: int, rounds: int) -> dict[tuple[str, str], Timing]:
    """See `of_form`; in a process of its own, as a store that has freed a million tensors slows all that follow."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(timed_form, name, peers, nbytes, rounds).result()


def timed_form(name: str, peers: bool, nbytes: int, rounds: int) -> dict[tuple[str, str], Timing]:
    """See `of_form`; of the form of that name."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return of_form(FORMS[name], {OURS: Ours, **BASELINES, **(installed_peers() if peers else {})}, nbytes, rounds)


def of_form(
    form: Form, stores: Mapping[str, Callable[[int, Batch], Store]], nbytes: int, rounds: int
) -> dict[tuple[str, str], Timing]:
    """All stores, each of `nbytes`, with rows of one form: timings by store and operation."""
    rows = max(2 * max(GATHERED), nbytes // form.row_bytes)
    built = {name: make(rows, form.batch(2 * max(GATHERED))) for name, make in stores.items()}
    batch = form.batch(WRITTEN)
    timings = {}
    for what, count in zip(WHAT, (WRITTEN, *GATHERED), strict=True):
        alternatives = {name: operation(store, what, batch) for name, store in built.items()}
        calls = max(1, min(100, TURN_BYTES // (count * form.row_bytes)))
        for named, times in {what: calls, **({COLD[what]: 1} if form is FORMS[TOKENS] else {})}.items():
            for name, timing in measure(alternatives, rounds, calls=times, warmup=5).items():
                timings[name, named] = timing
    return timings


def operation(store: Store, what: str, batch: Batch) -> Callable[[], object]:
    """The call that is timed."""
    if what == WHAT[0]:
        return lambda: store.write(batch)
    return lambda: store.gather(int(what[1:]))


def admissions(rounds: int, capacity: int = 20_000) -> dict[str, Timing]:
    """The decision over 14 rows in a full buffer, without the copy, by policy."""
    fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"input_ids": ((16,), torch.int64)}
    fields |= {"label": ((), torch.int64), "score": ((), torch.float32), "features": ((8,), torch.float32)}
    form = Form(fields)
    alternatives = {}
    for name, needs in ADMISSIONS.items():
        config = BufferConfig.model_validate({"capacity": capacity, "policy": name, **needs})
        many, few = form.batch(config.rows(form.row_bytes)), form.batch(WRITTEN)
        many["label"], few["label"] = many["label"] % PARTITIONS, few["label"] % PARTITIONS
        buffer = RehearsalBuffer(config, RowLayout.infer(few))
        buffer.offer(many)
        buffer.offer(many)
        packed = torch.zeros((WRITTEN, buffer.layout.row_bytes), dtype=torch.uint8)
        buffer.layout.pack(buffer.layout.columns(few), packed)
        alternatives[name] = admitting(buffer, packed)
    return measure(alternatives, rounds, calls=10, warmup=5)


def admitting(buffer: RehearsalBuffer, packed: torch.Tensor) -> Callable[[], object]:
    """Admission, one step after the other."""
    steps = itertools.count(10)
    return lambda: buffer.admit(packed, next(steps))


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Speed in the worst cell (form of rows and operation) against the fastest peer there, and against a bare copy.

    A ratio above 1 says that this package is the faster one; it is that of the medians.
    """
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["what"] != ADMISSION:
            cells.setdefault((row["rows"], row["what"]), {})[row["store"]] = row["ms"]
    admitted = [1e3 * row["ms"] for row in rows if row["what"] == ADMISSION]
    peers = [min(others) / cell[OURS] for cell in cells.values() if (others := _of_peers(cell))]
    ahead = {"cells_ahead": float(sum(ratio >= 1 for ratio in peers)), "vs_best_peer_min": min(peers)} if peers else {}
    copies = [cell[COPY] / cell[OURS] for cell in cells.values()]
    return {**ahead, "cells": float(len(cells)), "vs_copy_min": min(copies), "admission_us_max": max(admitted)}


def _of_peers(cell: Mapping[str, float]) -> list[float]:
    return [ms for store, ms in cell.items() if store != OURS and store not in BASELINES]


def table(timings: Mapping[tuple[str, str, str], Timing]) -> tuple[list[str], list[list[str]]]:
    """Microseconds by store, form of rows and operation."""
    columns = list(dict.fromkeys((name, what) for name, _, what in timings))
    header = ["", *(f"{name.partition(',')[0]} {what}" for name, what in columns)]
    lines = [[store, *cells(timings, store, columns)] for store in dict.fromkeys(store for _, store, _ in timings)]
    return header, lines


def cells(
    timings: Mapping[tuple[str, str, str], Timing], store: str, columns: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """One line of the table."""
    return (f"{1e6 * timings[name, store, what].median_s:.1f}" for name, what in columns)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
