"""Rows of different length in a buffer: the memory they take, and the time beside rows of one length.

    python -m scripts.benchmarks.ragged --json out/bench_ragged

Texts of up to 4,096 tokens, three int64 fields each (ids, labels, mask), whose lengths are log-normal with a mean of
300. `--admissions` of them are written to random slots, 14 at a time; then the bytes held are compared with those of
the rows stored. The calls are those of a job: S14 stages a batch of 14 texts, padded to the longest of them; W14 stages
it and writes it to slots that were chosen before; G7 and G64 read 7 and 64 to the memory that they are sent from.
Beside it there is a storage of rows of one length, that of the mean text: as many bytes stored, none of padding.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.chunks import CHUNK_OPENERS
from rehearsal_plugin.buffer.row_reader import RowReader
from rehearsal_plugin.buffer.rows.allocator import zeros
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.staging import BoundedRows, Staging
from rehearsal_plugin.buffer.storage import HostStorage, RowStorage
from rehearsal_plugin.buffer.trimmed_storage import TrimmedStorage
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.core.arrays import ByteArray, IntArray
from scripts.benchmarks.measure import arguments_of, measure, publish, ratio
from scripts.common.tables import print_table

LONGEST, MEAN = 4096, 300
WRITTEN, GATHERED = 14, (7, 64)
BATCHES = 64  # that take turns
PADS = {"input_ids": 0.0, "labels": -100.0, "attention_mask": 0.0}

Batch: TypeAlias = Mapping[str, Tensor]
Write: TypeAlias = Callable[[IntArray, BoundedRows], None]


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes the report."""
    description = (__doc__ or "").partition("\n")[0]
    arguments = arguments_of(description, argv, admissions=1_000_000, capacity=20_000, rounds=301)
    rng = np.random.default_rng(0)
    texts = some_texts(rng)
    layout = dataclasses.replace(RowLayout.infer(texts), pads=PADS)
    in_memory, opened = CHUNK_OPENERS["memory"](BufferConfig(), 0), [0]

    def new_chunk(nbytes: int) -> ByteArray:
        opened[0] += nbytes
        return in_memory(nbytes)

    storage = TrimmedStorage(layout, arguments.capacity, new_chunk)
    written = fill(storage, texts, layout, arguments.capacity, arguments.admissions, rng)
    moved = opened[0] / written - 1
    batches = [narrow({name: texts[name][rng.integers(0, len(texts["labels"]), WRITTEN)] for name in PADS})
               for _ in range(BATCHES)]  # fmt: skip
    mean = storage.live_bytes // arguments.capacity // 24 // 2 * 2  # tokens, in whole multiples of 16 bytes
    of_one = [{name: texts[name][:WRITTEN, :mean].contiguous() for name in PADS} for _ in range(BATCHES)]
    one_layout = RowLayout.infer(of_one[0])
    rows = zeros(arguments.capacity * one_layout.row_bytes).reshape(arguments.capacity, -1)
    rows[:] = 1  # so that its pages are there
    one = HostStorage(rows)
    calls = {
        **operations("different", layout, batches, RowReader(storage, storage, layout), arguments.capacity, rng,
                     lambda slots, staged: storage.write(slots, staged.rows, None, staged.bounds)),
        **operations("one", one_layout, of_one, RowReader(one, None, one_layout), arguments.capacity, rng,
                     lambda slots, staged: one.write(slots, staged.rows)),
    }  # fmt: skip
    timings = measure(calls, arguments.rounds)
    names = [f"S{WRITTEN}", f"W{WRITTEN}", *(f"G{count}" for count in GATHERED)]
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
        "moved_vs_written": moved,
        "padded_vs_stored": arguments.capacity * layout.row_bytes / storage.live_bytes,
    }
    publish(arguments.json, {**memory, **{f"{name.lower()}_vs_one": found.median for name, found in ratios.items()}},
            table, ranks=1)  # fmt: skip
    return 0


def some_texts(rng: np.random.Generator, count: int = 256) -> Batch:
    """Random texts, padded to the longest length, `[count, LONGEST]` a field."""
    lengths = np.minimum(rng.lognormal(np.log(MEAN) - 0.5, 1.0, count), LONGEST).astype(int)
    batch = {name: torch.full((count, LONGEST), int(value)) for name, value in PADS.items()}
    for row, length in enumerate(lengths.tolist()):
        batch["input_ids"][row, :length] = torch.from_numpy(rng.integers(1, 50_000, length))
        batch["labels"][row, :length] = batch["input_ids"][row, :length]
        batch["attention_mask"][row, :length] = 1
    return batch


def narrow(batch: Batch) -> Batch:
    """The texts padded to the longest of them, as a collator does."""
    width = int(batch["attention_mask"].sum(1).max())
    return {name: field[:, :width].contiguous() for name, field in batch.items()}


def packed(batch: Batch, layout: RowLayout) -> Tensor:
    """Texts as rows `[n, row_bytes]` uint8."""
    rows = torch.zeros((len(batch["labels"]), layout.row_bytes), dtype=torch.uint8)
    layout.pack(layout.columns(batch), rows)
    return rows


def fill(
    storage: RowStorage, texts: Batch, layout: RowLayout, capacity: int, admissions: int, rng: np.random.Generator
) -> int:
    """Write random texts, first to every slot, then to random ones; returns the bytes of their tokens."""
    rows, tokens, written = packed(texts, layout), texts["attention_mask"].sum(1).numpy(), 0
    for start in range(0, admissions, WRITTEN):
        first = np.arange(start, min(start + WRITTEN, capacity))
        slots = first if len(first) else rng.choice(capacity, WRITTEN, replace=False)
        places = rng.integers(0, len(tokens), len(slots))
        storage.write(slots, rows, places)
        written += 24 * int(tokens[places].sum())
    return written


def operations(
    name: str, layout: RowLayout, batches: Sequence[Batch], reader: RowReader, capacity: int, rng: np.random.Generator,
    write: Write,
) -> dict[str, Callable[[], object]]:  # fmt: skip
    """The calls that are timed, by name; each takes another batch and other slots every time."""
    staging = Staging(layout, torch.device("cpu"))
    columns = itertools.cycle([layout.columns(batch, narrow=True) for batch in batches])

    def slots(count: int) -> itertools.cycle[IntArray]:
        return itertools.cycle([rng.choice(capacity, count, replace=False) for _ in range(BATCHES)])

    def stage() -> BoundedRows:
        staging.pack(next(columns), layout, WRITTEN)
        return staging.flush()

    def gather(count: int) -> Callable[[], object]:
        chosen = slots(count)
        return lambda: reader.read(next(chosen))

    to = slots(WRITTEN)
    return {
        f"{name} S{WRITTEN}": stage,
        f"{name} W{WRITTEN}": lambda: write(next(to), stage()),
        **{f"{name} G{count}": gather(count) for count in GATHERED},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
