"""What a rehearsal counts and times."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rehearsal_plugin.shares import IntArray

__all__ = ["Metrics"]


@dataclass
class Metrics:
    """Totals since the start on this rank; times in milliseconds.

    Attributes:
        steps: Exchanges launched.
        rows_offered: Candidates offered to this rank's buffer.
        rows_admitted: Of those, rows that were stored.
        rows_duplicate: Candidates that were not offered, because this rank's buffer held their content
            (`buffer.deduplicate`).
        rows_stored: Rows stored now.
        rows_replayed: Rows added to batches.
        rows_displaced: Rows of the batch that made room for replayed ones (`mode: replace` at forward).
        rows_sent: Rows sent to other ranks.
        rows_received: Rows received from other ranks.
        bytes_sent: Bytes of those rows; headers and state on its way back are not counted.
        bytes_received: Bytes of those rows.
        collectives: Collectives issued.
        failures: Exchanges that failed, after which this rank went on alone.
        waited_ms: Time that the training thread waited for the background.
        drawn_ms: Time to draw rows and read them from storage, in the background.
        exchanged_ms: Time that the background waited for collectives.
        replayed_by_partition: Replayed rows by partition key.
    """

    steps: int = 0
    rows_offered: int = 0
    rows_admitted: int = 0
    rows_duplicate: int = 0
    rows_stored: int = 0
    rows_replayed: int = 0
    rows_displaced: int = 0
    rows_sent: int = 0
    rows_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    collectives: int = 0
    failures: int = 0
    waited_ms: float = 0.0
    drawn_ms: float = 0.0
    exchanged_ms: float = 0.0
    replayed_by_partition: Counter[int] = field(default_factory=Counter)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the total called `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + 1e3 * (time.perf_counter() - start))

    def count_replayed(self, keys: IntArray) -> None:
        """Count replayed rows by their partition keys `[n]`."""
        distinct, counts = np.unique(keys, return_counts=True)
        self.replayed_by_partition.update(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """All totals; those by partition as pairs of key and rows."""
        return {**vars(self), "replayed_by_partition": sorted(self.replayed_by_partition.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from what `state_dict` gave."""
        self.replayed_by_partition = Counter({int(key): int(rows) for key, rows in state["replayed_by_partition"]})
        totals = {name: type(value) for name, value in vars(self).items() if isinstance(value, (int, float))}
        vars(self).update({name: kind(state.get(name, 0)) for name, kind in totals.items()})

    def flat(self) -> dict[str, float]:
        """Name to number; partitions as `rows_replayed/<key>`."""
        totals = {name: value for name, value in vars(self).items() if isinstance(value, (int, float))}
        return totals | {f"rows_replayed/{key}": value for key, value in self.replayed_by_partition.items()}
