"""Sections of the page of performance about one machine: the buffer, a buffer in a file, and the overhead of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.benchmarks.buffer import ADMISSIONS, COLD, FORMS, OURS, TOKENS, WHAT
from scripts.benchmarks.overhead_sides import PHASES
from scripts.benchmarks.page_section import Report, Section
from scripts.common.goals import Goal
from scripts.common.tables import markdown_table

__all__ = ["BUFFER", "FILE", "OVERHEAD", "RAGGED"]

BUFFER_TEXT = """\
Each store holds about 1 GB of rows. *W14* writes 14 rows to random places, and *G7* and *G64* gather 7 and 64.
Drawing the places is part of all. Everything runs on one thread, and a store is called up to 100 times while it is
its turn.

- **rehearsal_plugin** is measured the public way. `RehearsalBuffer.offer` takes a batch of tensors with the policy
  `random_replace`, which keeps every row. `sample` gives a batch of tensors in memory that is used again.
- **raw numpy** is the bare copy of rows that are packed already and stay so.
- **torchrl** is the replay buffer with its own methods, and the storage alone without writer, sampler and lock.

`--peers` measures whatever you have installed of them. Two do not install beside the rest, and are left out. The last
wheel of Reverb, 0.14, asks for TensorFlow 2.15. mosaicml-streaming 0.13 wants transformers below 5 and numpy below
2.2.
"""

BUFFER_GOALS = (
    Goal("vs_best_peer_min", "times as fast as the fastest peer, in the worst cell of the table", 1.0),
    Goal("vs_copy_min", "times as fast as a contiguous copy of the same bytes, in the worst cell", 0.8),
    Goal("admission_us_max", "µs to decide over 14 rows, the slowest of the policies below", 30.0, at_most=True),
)

BUFFER_LIMITS = """\
**Why it is fast.** Rows are stored past the cache ("non-temporal"). So nothing is fetched only to be overwritten, and
your training step keeps what it has in the cache. Rows below 64 KiB are read four side by side. Both go by whole
lines of the cache where there is AVX-512. That is a file of C, `rehearsal_plugin/buffer/rows/_copies.c`, for x86-64
with glibc. It copies plainly elsewhere.

**Where it is behind.** cpprb writes 14 rows 1.2 to 1.8 times as fast, in all forms of rows. A list whose seven rows of
602 KB are stacked is 1.2 times as fast as a gather of them. All other gathers are the fastest here.

**How much it varies.** On virtual machines the ratios vary with the machine and from hour to hour, by half and more.
The run above is on a processor of AMD. On one of Intel, cpprb was ahead in one cell, W14 of 3 KB: 21 µs against 26.
There the other eight were won by 1.03 to 1.56 times. Make your own table before you compare.

**What is left beside the copy** is Python: to look at the batch, to draw, to keep the index and to hand over each
field. *Raw numpy* has only the copy, and the choice of places. cpprb decides in compiled code, looks at no batch, and
writes in a ring. So Python limits small writes, and vanishes with larger rows or more of them. `balanced` pays for its
partitions,
`score` for finding rows that may leave. `herding` compares all rows of the partitions that a batch touches with each
other. That grows with the square of their number: keep to some tens of rows a partition.

**What tests hold.** In the steady state neither call allocates memory for rows, faults in a page or waits for the
kernel. Neither calls more functions for more rows. That goes for buffers in memory without `deduplicate`, which looks
at each row that it turns away or replaces. A buffer in a file asks the kernel for each row beforehand. Copies of up
to 64 KiB keep the GIL, and longer ones give it up once.

**Memory beside the rows** is 8 bytes a row. Add 4 once rows of other ranks were loaded, 1 where changes are asked
for, up to 27 with partitions, 4 with scores, 8 where rows are drawn by them, and up to 21 with `deduplicate`. That is
2 % of a row of 3 KB with partitions. A `commit` keeps a copy of these numbers.
"""

FILE_TEXT = """\
Two storages over one file of rows take turns to read random ones. *Ahead* is that of a buffer with `storage: mmap`:
it asks the kernel for all pages of the rows before it touches them. *On demand* leaves it to the kernel to find out
page by page. A memory cgroup leaves a tenth of the file for the page cache. Major faults are pages that a step waited
for, each by itself.
"""

RAGGED_TEXT = """\
Texts of up to 4,096 tokens, three int64 fields each, have log-normal lengths with a mean of 300. They are written to
random slots, 14 at a time, and read 7 or 64 at a time, by the calls of a job:

- *S14* copies a batch of 14 to the staging area, padded to its longest text as a collator does it.
- *W14* does that, and writes them to slots that were chosen before.
- *G7* and *G64* read to the memory that rows are sent from.

Beside them is a storage of rows of one length, that of the mean text, with the same calls. It stores as many bytes,
and no padding. The two take turns. *Held* is all memory of the rows, with the places of replaced ones and the table
of what lies where.
"""

RAGGED_GOALS = (
    Goal("held_vs_stored", "bytes held for each byte of the rows stored", 1.15, at_most=True),
    Goal("w14_vs_one", "times as long as with rows of one length to stage and write 14", 1.3, at_most=True),
    Goal("g64_vs_one", "the same to read 64", 1.3, at_most=True),
)

RAGGED_LIMITS = """\
No call goes over the 98 KB of a padded row. Padding is written once, when the memory is taken. From then on each row
has it behind a bound that is remembered. What is left:

- A batch is as wide as its longest text, three times the mean one. It is staged like that, and the texts are looked
  at from there on for where they end.
- Where a text is read to the place of a longer one, the difference is padded again. That is about half as many bytes
  as the texts have.
- Memory near the bytes stored means that rows are moved out of chunks with many dead bytes, before these are used
  again. That is most of W14.

Staging is on the training thread, and takes as long whatever the limit on the length is. All else is in the
background.
"""

OVERHEAD_TEXT = """\
One DeepSpeed engine (ZeRO-1) takes turns in a job of two ranks:

- *plain*: without rehearsal, on batches of b + r = 6 + 2 rows,
- *control*: once more the same,
- *thread*: with rehearsal, on the first 6 of these rows, to which 2 are replayed,
- *inline*: the same, with collectives from the training thread.

The buffers are full, and every candidate is stored. A turn begins with a step that is not timed, so that the
background of a step runs behind the next one. The *ratio* is that to the turns without rehearsal of the same round,
by the clock. The *ratio of CPU time* is that of all threads of a rank. *Error* is the standard error of the median.

Such a machine changes its speed from second to second, by more than rehearsal costs. So a product of matrices is
timed in every pass of the model, and turns are told in units of its median. *Raw* is the ratio to *plain* without
that. What *control* has beside 1 is the noise that is left. Whatever slows all of a step would slow the product as
well, and not show. *Unit* is by how much it was slower than in the turns of *plain*.

*Paid* does without all that: it is the CPU time of the training thread inside of rehearsal. Where the background has
a core of its own, a step pays that, *waited*, and whatever becomes slower. The same calls take longer behind a model
than in a tight loop. So does other work: [growth](growth.md#milliseconds-between-two-steps) shows it for a loop that
sleeps in between, beside a training step without rehearsal.

The model makes at least as many operations for each byte of a row as a ResNet-18 for each byte of an image of 3 x 224
x 224 float32. That is 18,000, forwards and backwards, and 14 such images are 8 MiB. It computes for at least 200 ms.
A *light* model computes for 200 ms whatever the rows, a *short* one for 20 ms. All runs once on two cores, which the
ranks keep busy. It runs once more with the training threads of both ranks on one core, so that a step takes twice as
long. Then the other core is free for the threads of the plugin.
"""

OVERHEAD_GOALS = (
    Goal("paid_ms_small", "ms of CPU time of the training thread, 0.125 MiB a step", 0.3, at_most=True),
    Goal(
        "paid_vs_copies_8mib",
        "the same of 8 MiB, against two bare copies of these",
        1.25,
        at_most=True,
    ),
    Goal("ratio_busy", "step time against plain DeepSpeed, two busy cores, the worst size", 1.02, at_most=True),
    Goal("ratio_short_busy", "0.125 MiB a step, steps of 20 ms, two busy cores", 1.05, at_most=True),
    Goal("ratio_busy_light", "8 MiB a step for a light model, two busy cores", 1.02, at_most=True),
)

OVERHEAD_LIMITS = """\
On the training thread your step pays for two copies: of its candidates out of the batch, and of the replayed rows
into it. The background makes a copy into the buffer, one out of it, and the exchange. On two busy cores all of that
is time that the model does not get. Replayed rows are taken where they arrived unless several micro-batches share
them. In host memory they and the batch lie in blocks that are used again once nobody refers to them.

**What is left** are a few hundred calls of Python and torch, whatever the rows. They take longer behind a model
than [in a tight loop](growth.md#milliseconds-between-two-steps). The background is Python as well. So a step of 20 ms
pays most, in proportion. With steps of 200 ms and more, all of it is of the size of the errors.

On GPUs the copies run on a side stream and the exchange is NCCL's, but none of this has been run there. *Thread* and
*inline* are the same with NCCL, whose collectives are issued from the training thread. You measure it on two GPUs
with

```
python -m pytest -m gpu
DS_ACCELERATOR=cuda python -m scripts.benchmarks.overhead --json docs/results/bench_overhead.json
```
"""


def buffer_tables(report: Report, docs: Path) -> list[str]:
    """Microseconds by store, rows and operation; and of the decision, by policy."""
    timed = {(row["store"], row["rows"], row["what"]): 1e3 * row["ms"] for row in report["rows"]}
    columns = [(rows, what) for rows in FORMS for what in WHAT if (OURS, rows, what) in timed]
    stores = dict.fromkeys(store for store, _, what in timed if what in WHAT)
    lines = [[store, *(f"{timed[store, rows, what]:,.1f}" for rows, what in columns)] for store in stores]
    policies = [[store, f"{us:.1f}"] for (store, _, _), us in timed.items() if store in ADMISSIONS]
    cold = [[store, *(f"{timed[store, TOKENS, what]:,.1f}" for what in COLD.values())] for store in stores]
    return [
        "Microseconds a call, medians:\n",
        markdown_table(["", *(f"{rows}: {what}" for rows, what in columns)], lines),
        f"The same of {TOKENS}, where a store is called once and then all others are, so that nothing of it is in the "
        "cache, as in a job, which calls it once a step:\n",
        markdown_table(["", *WHAT], cold),
        "Microseconds to decide over 14 rows in a full buffer, by policy; the copy is not in them:\n",
        markdown_table(["policy", "µs"], policies),
    ]


def file_tables(report: Report, docs: Path) -> list[str]:
    """A line for each way to read."""
    lines = [
        [row["reads"], f"{row['ms']:.2f} ({row['ms_low']:.2f} to {row['ms_high']:.2f})", f"{row['faults']:.1f}"]
        for row in report["rows"]
    ]
    first = report["rows"][0]
    return [
        f"{first['drawn']} rows of {first['row_bytes'] >> 10} KiB of a file of {first['file_mb']:,} MiB, with "
        f"{first['cache_mb']:,} MiB of page cache:\n",
        markdown_table(["", "ms a step (quartiles)", "major faults a step"], lines),
    ]


def ragged_tables(report: Report, docs: Path) -> list[str]:
    """The bytes held, and a call beside one with rows of one length."""
    memory = report["summary"]
    lines = [
        [row["operation"], f"{row['different_us']:.1f}", f"{row['one_us']:.1f}",
         f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"]
        for row in report["rows"]
    ]  # fmt: skip
    return [
        f"Held are {memory['held_vs_stored']:.3f} bytes for each byte stored; padded rows would take "
        f"{memory['padded_vs_stored']:.1f}. For each byte written, {memory['moved_vs_written']:.1f} are moved.\n",
        markdown_table(["", "different lengths, µs", "one length, µs", "ratio"], lines),
    ]


def overhead_tables(report: Report, docs: Path) -> list[str]:
    """A line for every side of every case, and the share of each phase."""
    lines, phases = [], []
    for row in report["rows"]:
        size = f"{row['step_bytes'] / 2**20:.3g}{kind_of(row)}"
        case = [size, "yes" if row["free_core"] else "no", row["engine"]]
        work = [f"{1e-3 * row['operations']:.3g}", f"{row['step_ms']:.0f}", str(row["rounds"])]
        wall, cpu = (f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})" for name in RATIOS)
        others = [f"{row[name]:.3f}" for name in ("raw_ratio", "unit_ratio")]
        lines.append([*case, *work, wall, f"{standard_error(row):.3f}", *others, cpu])
        if PHASES[0] in row:
            phases.append([*case, *(f"{row[name]:.2f}" for name in PHASES)])
    heads = ["MiB a step and rank", "free core", "engine"]
    ratios = ["ratio (quartiles)", "error", "raw", "unit", "ratio of CPU time"]
    return [
        markdown_table([*heads, "1,000 operations a byte", "ms a step", "rounds", *ratios], lines),
        "Milliseconds of a step on rank 0; the first three on the training thread, the rest in the background. *Paid* "
        "is CPU time, the others go by the clock, so that they have in them what else ran on the core meanwhile:\n",
        markdown_table([*heads, *(name.removesuffix("_ms") for name in PHASES)], phases),
    ]


def kind_of(row: Mapping[str, Any]) -> str:
    """What a size is marked with."""
    return " (short)" if row.get("short") else " (light)" if row["light"] else ""


def standard_error(row: Mapping[str, Any]) -> float:
    """Of the median ratio, by the quartiles, as for rounds that are normally distributed."""
    deviation = float(row["ratio_high"] - row["ratio_low"]) / 1.349
    return deviation * math.sqrt(math.pi / 2 / row["rounds"])


RATIOS = ("ratio", "cpu_ratio")

BUFFER = Section("buffer", "The buffer", BUFFER_TEXT, BUFFER_GOALS, buffer_tables, BUFFER_LIMITS)
FILE = Section("file", "A buffer in a file", FILE_TEXT, (), file_tables)
OVERHEAD = Section("overhead", "What a step pays", OVERHEAD_TEXT, OVERHEAD_GOALS, overhead_tables, OVERHEAD_LIMITS)
RAGGED = Section("ragged", "Rows of different length", RAGGED_TEXT, RAGGED_GOALS, ragged_tables, RAGGED_LIMITS)
