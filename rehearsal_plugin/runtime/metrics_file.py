"""A small file of what a job does, which rank 0 writes and `rehearsal watch` and `rehearsal report` read.

A JSON object a line. The first line of a job has `"event": "start"`, the last one `"event": "end"`; all others are
records of a step:

| key | meaning |
|---|---|
| `step`, `time` | optimizer step from 0, seconds since 1970 |
| `rows_new`, `rows_seen` | new rows and replayed rows that the model saw in this job |
| `ratio` | share of replayed rows that is asked for now; null where `representatives` says how many |
| `guard` | lowest mean loss on replayed rows so far, and whether the last one is past the bound; null without a guard |
| `age`, `age/3` | quartiles of the ages in steps of a sample of the stored rows, and their median in partition 3 |
| `metrics` | what `Rehearsal.metrics` gives on rank 0 |
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.metrics import few_partitions
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator

__all__ = ["MetricsFile"]

LOG = logging.getLogger(__name__)

MOST_SAMPLED = 4096
"""Rows whose ages are looked at, so that a record costs the same however large the buffer is."""

MOST_PARTITIONS = 32
"""Partitions whose ages are told."""


class MetricsFile:
    """Writes records on rank 0, if the section names a file; all calls are made on the training thread.

    A file that cannot be written is given up with a warning: no job ends because of it.

    Args:
        config: The `rehearsal` section.
    """

    def __init__(self, config: RehearsalConfig) -> None:
        self._config, self._path = config, None if config.metrics.file is None else Path(config.metrics.file)
        self._coordinator: ReplayCoordinator | None = None  # from the first step on
        self._last_step = -1

    def note_step(self, coordinator: ReplayCoordinator, rows_new: int, rows_seen: int) -> None:
        """Write a record of the step that ends, if it is one of every so many; see the table above."""
        if self._path is None or coordinator.lifecycle.rank:
            return
        if self._coordinator is None:
            self._coordinator = coordinator
            self._write(self._start(coordinator))
        if coordinator.step % self._config.metrics.every == 0:
            self._write_record(coordinator, rows_new, rows_seen)

    def close(self, rows_new: int, rows_seen: int) -> None:
        """Write the last record and the end."""
        if self._path is None or self._coordinator is None:
            return
        if self._coordinator.step != self._last_step:
            self._write_record(self._coordinator, rows_new, rows_seen)
        self._write({"event": "end", "step": self._coordinator.step, "time": time.time()})
        self._path = None

    def _start(self, coordinator: ReplayCoordinator) -> dict[str, Any]:
        config, lifecycle = self._config, coordinator.lifecycle
        shown = {"mode": config.mode, "representatives": config.representatives, "policy": config.buffer.policy}
        shown |= {"partition_by": config.buffer.partition_by, "strategy": config.strategy.name}
        start = {"event": "start", "step": coordinator.step, "time": time.time(), "ranks": lifecycle.size}
        return {**start, "section": shown}

    def _write_record(self, coordinator: ReplayCoordinator, rows_new: int, rows_seen: int) -> None:
        self._last_step = coordinator.step
        ratio, guard = coordinator.queue.ratio, coordinator.losses.guard
        record: dict[str, Any] = {
            "step": coordinator.step,
            "time": time.time(),
            "rows_new": rows_new,
            "rows_seen": rows_seen,
        }
        record["ratio"] = None if self._config.ratio is None else ratio.ratio
        record["guard"] = None
        if guard is not None:
            state = guard.state_dict()
            record["guard"] = {"best": state["best"], "exceeded": state["exceeded"]}
        self._write({**record, **_ages(coordinator), "metrics": few_partitions(coordinator.totals())})

    def _write(self, record: dict[str, Any]) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size >= self._config.metrics.rotate_bytes:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            LOG.warning(
                "rehearsal.metrics.file %s cannot be written: %s; no more metrics are written, and the job goes on",
                self._path,
                error,
            )
            self._path = None


def _ages(coordinator: ReplayCoordinator) -> dict[str, Any]:
    """Quartiles of the ages of stored rows, and the median of each partition where there are few."""
    prefetcher = coordinator.prefetcher
    count = 0 if prefetcher is None else len(prefetcher.buffer)
    if prefetcher is None or not count:
        return {}
    buffer, now = prefetcher.buffer, coordinator.step
    ages = now - buffer.written(_some_of(count, MOST_SAMPLED))
    told: dict[str, Any] = {"age": np.quantile(ages, [0, 0.25, 0.5, 0.75, 1]).tolist()}
    keys, sizes = buffer.counts()
    if len(keys) <= MOST_PARTITIONS:
        for key, size in zip(keys.tolist(), sizes.tolist(), strict=True):
            index = _some_of(size, MOST_SAMPLED // MOST_PARTITIONS)
            if size:
                slots = buffer.slots(np.full(len(index), key), index)
                told[f"age/{key}"] = float(np.median(now - buffer.written(slots)))
    return told


def _some_of(count: int, most: int) -> IntArray:
    """Numbers below `count`, at most `most` of them, evenly spread."""
    return np.arange(0, count, max(1, -(-count // most)))
