"""Rows of different length in a buffer: the memory they take, and the time beside rows of one length.

    python -m scripts.benchmarks.ragged --json out/bench_ragged

Texts of up to 4,096 tokens, three int64 fields each (ids, labels, mask), whose lengths are log-normal with a mean of
300. `--admissions` of them are written to random slots, 14 at a time; then the bytes held are compared with those of
the rows stored. W14 writes 14 texts, G7 and G64 read 7 and 64. They go in and come out as padded rows, as they do in a
job. Beside it there is a storage of rows of one length, that of the mean text: as many bytes stored, none of padding.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.allocator import zeros
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.storage import HostStorage, RowStorage
from rehearsal_plugin.buffer.trimmed_storage import TrimmedStorage
from rehearsal_plugin.core.arrays import IntArray
from scripts.benchmarks.measure import arguments_of, measure, publish, ratio
from scripts.common.tables import print_table

LONGEST, MEAN = 4096, 300
WRITTEN, GATHERED = 14, (7, 64)
PADS = {"input_ids": 0.0, "labels": -100.0, "attention_mask": 0.0}


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes the report."""
    description = (__doc__ or "").partition("\n")[0]
    arguments = arguments_of(description, argv, admissions=1_000_000, capacity=20_000, rounds=301)
    rng = np.random.default_rng(0)
    layout, texts = some_texts(rng)
    storage = TrimmedStorage(layout, arguments.capacity, zeros)
    fill(storage, texts, arguments.capacity, arguments.admissions, rng)
    mean = storage.live_bytes // arguments.capacity // 16 * 16
    rows = zeros(arguments.capacity * mean).reshape(arguments.capacity, mean)
    rows[:] = 1  # so that its pages are there
    calls = {
        **operations("different", storage, texts, arguments.capacity, rng),
        **operations("one", HostStorage(rows), texts[:, :mean].contiguous(), arguments.capacity, rng),
    }
    timings = measure(calls, arguments.rounds)
    names = [f"W{WRITTEN}", *(f"G{count}" for count in GATHERED)]
    ratios = {name: ratio(timings[f"different {name}"], timings[f"one {name}"]) for name in names}
    table = [
        {"operation": name, "different_us": 1e3 * float(timings[f"different {name}"].row()["ms"]),
         "one_us": 1e3 * float(timings[f"one {name}"].row()["ms"]), "ratio": found.median, "low": found.low,
         "high": found.high}
        for name, found in ratios.items()
    ]  # fmt: skip
    print_table(
        "A call", ["", "different lengths, us", "one length, us", "ratio"],
        [[str(r["operation"]), f"{r['different_us']:.1f}", f"{r['one_us']:.1f}", f"{r['ratio']:.2f}"] for r in table],
    )  # fmt: skip
    memory = {
        "held_vs_stored": storage.held_bytes / storage.live_bytes,
        "padded_vs_stored": arguments.capacity * layout.row_bytes / storage.live_bytes,
    }
    publish(arguments.json, {**memory, **{f"{name.lower()}_vs_one": found.median for name, found in ratios.items()}},
            table, ranks=1)  # fmt: skip
    return 0


def some_texts(rng: np.random.Generator, count: int = 256) -> tuple[RowLayout, Tensor]:
    """The layout of a text, and padded rows `[count, row_bytes]` uint8 of random ones."""
    lengths = np.minimum(rng.lognormal(np.log(MEAN) - 0.5, 1.0, count), LONGEST).astype(int)
    batch = {name: torch.full((count, LONGEST), int(value)) for name, value in PADS.items()}
    for row, length in enumerate(lengths.tolist()):
        batch["input_ids"][row, :length] = torch.from_numpy(rng.integers(1, 50_000, length))
        batch["labels"][row, :length] = batch["input_ids"][row, :length]
        batch["attention_mask"][row, :length] = 1
    layout = dataclasses.replace(RowLayout.infer(batch), pads=PADS)
    rows = torch.zeros((count, layout.row_bytes), dtype=torch.uint8)
    layout.pack(layout.columns(batch), rows)
    return layout, rows


def fill(storage: RowStorage, texts: Tensor, capacity: int, admissions: int, rng: np.random.Generator) -> None:
    """Write random texts, first to every slot, then to random ones."""
    for start in range(0, admissions, WRITTEN):
        first = np.arange(start, min(start + WRITTEN, capacity))
        slots = first if len(first) else rng.choice(capacity, WRITTEN, replace=False)
        storage.write(slots, texts, rng.integers(0, len(texts), len(slots)))


def operations(
    name: str, storage: RowStorage, texts: Tensor, capacity: int, rng: np.random.Generator
) -> dict[str, Callable[[], object]]:
    """The calls that are timed, by name; each goes to other slots every time."""

    def places(count: int) -> IntArray:
        return rng.choice(capacity, count, replace=False)

    def gather(count: int) -> Callable[[], object]:
        out = torch.empty((count, storage.row_bytes), dtype=torch.uint8)
        return lambda: storage.read(places(count), out)

    chosen = rng.integers(0, len(texts), WRITTEN)
    return {
        f"{name} W{WRITTEN}": lambda: storage.write(places(WRITTEN), texts, chosen),
        **{f"{name} G{count}": gather(count) for count in GATHERED},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
