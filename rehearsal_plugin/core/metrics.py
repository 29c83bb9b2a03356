"""Counters and timers of a rehearsal on one rank."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.core.arrays import IntArray

__all__ = ["MOST_PARTITIONS_COUNTED", "MOST_PARTITIONS_TOLD", "Metrics", "few_partitions"]

MOST_PENDING = 256  # micro-batches
MOST_PARTITIONS_SHOWN = 32
MOST_PARTITIONS_TOLD = 1024
"""Partitions that `Rehearsal.metrics` tells numbers of."""

MOST_PARTITIONS_COUNTED = 16_384
"""Partitions whose replayed rows and tokens are kept count of, where ever new ones come."""

T = TypeVar("T", int, str)


@dataclass
class Metrics:
    """Totals since the start on this rank; times in milliseconds.

    No lock: each total has one writer.

    | total or call | thread |
    |---|---|
    | `written_ms`, `drawn_ms`, `exchanged_ms`, `rows_retrieved` | background |
    | `collectives`, rows and bytes sent and received | background; training with `exchange.launch: inline` |
    | all other totals, `count_replayed`, `count_tokens` | training |
    | `flat`, `state_dict` | training, at any time; a total of the background may be one step behind |
    | `load_state_dict` | training, no job in flight |

    Attributes:
        steps: Exchanges launched.
        rows_offered: Candidates offered to this rank's buffer.
        rows_admitted: Of those, rows that were stored.
        rows_duplicate: Candidates that were not offered, because this rank's buffer held their content
            (`buffer.deduplicate`).
        rows_stored: Rows stored now.
        rows_replayed: Rows added to batches.
        rows_displaced: Rows of the batch that made room for replayed ones (`mode: replace` at forward).
        rows_retrieved: Rows drawn for this rank because they are near to new ones (`sampling.weights: retrieved`).
        rows_sent: Rows sent to other ranks.
        rows_received: Rows received from other ranks.
        bytes_sent: Bytes of those rows; headers and state on its way back are not counted.
        bytes_received: Bytes of those rows.
        collectives: Collectives issued.
        failures: Exchanges that failed, after which this rank went on alone.
        augmented_ms: Time to copy candidates out of batches and replayed rows into them, on the training thread.
        waited_ms: Time that the training thread waited for the background.
        written_ms: Time to copy candidates to their places, in the background.
        drawn_ms: Time to draw rows and read them from storage, in the background.
        exchanged_ms: Time that the background waited for collectives.
        tokens_new: Tokens in new rows that the model saw: those with a label, or of the mask where there are none.
        tokens_replayed: The same of replayed rows.
        replayed_by_partition: Replayed rows by partition key. Once there are twice `MOST_PARTITIONS_COUNTED`, the half
            with the smaller counts is forgotten, and counted from 0 if it comes again.
        tokens_by_partition: The same tokens by name and partition, as `tokens_new/3`; bounded in the same way.
        pinned: Partition keys whose replayed rows are never forgotten.
        losses: Mean losses of the last step that was measured, by name, as `loss_new` and `loss_replayed/3`.
    """

    steps: int = 0
    rows_offered: int = 0
    rows_admitted: int = 0
    rows_duplicate: int = 0
    rows_stored: int = 0
    rows_replayed: int = 0
    rows_displaced: int = 0
    rows_retrieved: int = 0
    rows_sent: int = 0
    rows_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    collectives: int = 0
    failures: int = 0
    augmented_ms: float = 0.0
    waited_ms: float = 0.0
    written_ms: float = 0.0
    drawn_ms: float = 0.0
    exchanged_ms: float = 0.0
    tokens_new: int = 0
    tokens_replayed: int = 0
    replayed_by_partition: Counter[int] = field(default_factory=Counter)
    tokens_by_partition: Counter[str] = field(default_factory=Counter)
    losses: dict[str, float] = field(default_factory=dict)
    pinned: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._pending: list[tuple[Tensor, int, IntArray | None, int]] = []  # tokens that are still on the device

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the total called `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + 1e3 * (time.perf_counter() - start))

    def count_replayed(self, keys: IntArray, times: int = 1) -> None:
        """Count replayed rows by their partition keys `[n]`; -1 times takes them back."""
        distinct, counts = np.unique(keys, return_counts=True)
        for key, count in zip(distinct.tolist(), (times * counts).tolist(), strict=True):
            if times > 0 or key in self.replayed_by_partition:  # one that was forgotten has nothing to take back
                self.replayed_by_partition[key] += count
        if len(self.replayed_by_partition) > 2 * MOST_PARTITIONS_COUNTED:
            self.replayed_by_partition = _largest(self.replayed_by_partition, self.pinned)

    def count_tokens(self, tokens: Tensor, new: int, keys: IntArray | None, times: int = 1) -> None:
        """Count the tokens `[rows]` of a micro-batch, of which the first `new` rows are new ones, with their keys.

        They are read from the device once for many micro-batches, so that none waits for it; -1 times takes them back.
        """
        self._pending.append((tokens, new, keys, times))
        if len(self._pending) == MOST_PENDING:
            self._count_pending_tokens()

    def state_dict(self) -> dict[str, Any]:
        """All totals; those by partition as pairs of key and rows."""
        self._count_pending_tokens()
        return {
            **self._totals(),
            "replayed_by_partition": sorted(self.replayed_by_partition.items()),
            "tokens_by_partition": sorted(self.tokens_by_partition.items()),
            "losses": dict(self.losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from what `state_dict` returned."""
        self._pending.clear()
        vars(self).update({name: type(value)(state.get(name, 0)) for name, value in self._totals().items()})
        self.replayed_by_partition = Counter({int(key): int(rows) for key, rows in state["replayed_by_partition"]})
        self.tokens_by_partition = Counter({str(name): int(tokens) for name, tokens in state["tokens_by_partition"]})
        self.losses = {str(name): float(loss) for name, loss in state["losses"].items()}

    def flat(self, shown: Set[int] | None = None) -> dict[str, float]:
        """Name to number; partitions as `rows_replayed/<key>`, only those `shown` unless that is None."""
        self._count_pending_tokens()
        replayed, tokens = self.replayed_by_partition, self.tokens_by_partition
        if shown is None:
            by_partition = {f"rows_replayed/{key}": n for key, n in replayed.items()} | tokens
        else:
            by_partition = {f"rows_replayed/{key}": replayed[key] for key in shown if key in replayed}
            names = (f"{name}/{key}" for key in shown for name in ("tokens_new", "tokens_replayed"))
            by_partition |= {name: tokens[name] for name in names if name in tokens}
        return {**self._totals(), **by_partition, **self.losses}

    def _totals(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if isinstance(value, (int, float))}

    def _count_pending_tokens(self) -> None:
        """Count the tokens that are still on the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        everything = torch.cat([tokens for tokens, *_ in pending]).cpu().numpy()
        ends = np.cumsum([len(tokens) for tokens, *_ in pending])
        for counts, (_, new, keys, times) in zip(np.split(everything, ends[:-1]), pending, strict=True):
            counts = times * counts
            self._add_tokens("tokens_new", counts[:new], None if keys is None else keys[:new])
            self._add_tokens("tokens_replayed", counts[new:], None if keys is None else keys[new:])

    def _add_tokens(self, name: str, counts: IntArray, keys: IntArray | None) -> None:
        setattr(self, name, getattr(self, name) + int(counts.sum()))
        if keys is not None:
            for key in np.unique(keys).tolist():
                self.tokens_by_partition[f"{name}/{key}"] += int(counts[keys == key].sum())
            if len(self.tokens_by_partition) > 2 * MOST_PARTITIONS_COUNTED:
                self.tokens_by_partition = _largest(self.tokens_by_partition, frozenset())


def _largest(counts: Counter[T], pinned: Collection[T]) -> Counter[T]:
    """The `MOST_PARTITIONS_COUNTED` largest counts, and those that are pinned; of equal ones those of smaller keys."""
    order = sorted(counts.items(), key=lambda item: (item[0] not in pinned, -item[1], item[0]))
    return Counter(dict(order[: max(MOST_PARTITIONS_COUNTED, len(pinned))]))


def few_partitions(metrics: Mapping[str, float]) -> dict[str, float]:
    """The numbers of `Rehearsal.metrics` that fit in a log: without those by partition, where there are many."""
    partitions = {name.partition("/")[2] for name in metrics} - {""}
    shown = len(partitions) <= MOST_PARTITIONS_SHOWN
    return {name: value for name, value in metrics.items() if shown or "/" not in name}
