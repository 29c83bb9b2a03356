"""Candidates of a step on their way into the buffer: chosen, copied, thinned where there are too many, taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.policies import POLICIES
from rehearsal_plugin.buffer.policies.reservoir import thinned_places
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.staging import BoundedRows, Staging
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.rng import Purpose, RandomStream
from rehearsal_plugin.runtime.candidates import MICRO_BATCH_BITS, CandidateSelection

__all__ = ["STAGED_BYTES", "CandidateStaging"]

STAGED_BYTES = 32 << 20
"""Candidates that are held without thinning, however small the buffer is."""


class CandidateStaging:
    """Holds all candidates of a step, or a uniform sample of them; or the newest ones, with a policy that keeps these.

    A step may have very many micro-batches, and passes without a step, as of a learning-rate finder, never end. So at
    most as many rows are held as the buffer has, or as fit in `STAGED_BYTES`; beyond that, each new row takes the place
    of another by Algorithm R. For the newest it takes that of the oldest: rows are a ring, which begins at `_oldest`.

    All calls come from the training thread.

    Args:
        config: The `rehearsal` section.
        rank: This rank; keys the random numbers.
        capacity: Rows of the buffer.
        layout: Of the rows.
        device: Where batches live.

    Attributes:
        offered: Candidates since the last `flush`, held or not.
        micro_batches: Micro-batches since then.
    """

    def __init__(
        self, config: RehearsalConfig, rank: int, capacity: int, layout: RowLayout, device: torch.device
    ) -> None:
        self._selection = CandidateSelection(config, rank)
        self._rank, self._numbers = rank, RandomStream(config.seed, Purpose.THINNING)
        self._most = max(capacity, STAGED_BYTES // layout.row_bytes)
        self._staging, self._newest = Staging(layout, device), POLICIES[config.buffer.policy].newest
        self._oldest = 0  # place of the oldest row of a full ring
        self._parts: list[tuple[int, int]] = []  # micro-batch and rows, in their order, until rows are thinned
        self._owners: IntArray | None = None  # the micro-batch of each row, once they are
        self._sizes: dict[int, int] = {}  # candidates of each micro-batch
        self.offered = self.micro_batches = 0

    def stage(self, columns: list[Tensor], layout: RowLayout, step: int) -> int:
        """Copy the candidates among the rows of a micro-batch (see `RowLayout.pack`); returns its number."""
        number, self.micro_batches = self.micro_batches, self.micro_batches + 1
        places = self._selection.choose(columns, (*layout.fields, *layout.state), step, number)
        count = columns[0].shape[0] if places is None else places.shape[0]
        if self._owners is not None or self._staging.count + count > self._most:
            self._thin(columns, layout, places, count, (step << MICRO_BATCH_BITS) + number)
        else:
            self._staging.pack(columns, layout, count, places)
            self._parts.append((number, count))
        self._sizes[number] = count
        self.offered += count
        return number

    def withdraw(self, number: int) -> None:
        """Take back the candidates of a micro-batch, as if they had not been offered."""
        count = self._sizes.pop(number, None)
        if count is None:
            return
        self.offered -= count
        self._unroll()
        kept = np.flatnonzero(self._row_owners() != number)
        self._staging.keep(kept)
        if self._owners is not None:
            self._owners = self._owners[kept]
        self._parts = [part for part in self._parts if part[0] != number]

    def staged(self) -> BoundedRows:
        """All rows that are held, in their order."""
        self._unroll()
        return self._staging.staged()

    def flush(self) -> BoundedRows:
        """All rows that are held, untouched until the next flush; staging starts anew."""
        self._unroll()
        self._parts, self._owners = [], None
        self._sizes.clear()
        self.offered = self.micro_batches = 0
        return self._staging.flush()

    def state_dict(self) -> dict[str, Any]:
        """The rows that are held, as tensors, arrays and numbers."""
        rows, bounds = self.staged()
        return {"staged": rows, "bounds": bounds, "micro_batch": self.micro_batches, "offered": self.offered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, or what an earlier release did; the rows stay."""
        rows: Tensor = state["staged"]
        self._staging.restore(rows, state.get("bounds"))
        self.offered, self.micro_batches = int(state.get("offered", len(rows))), int(state["micro_batch"])
        self._parts = [(-1, len(rows))]
        if self.offered > len(rows):
            self._owners = self._row_owners()

    def _thin(self, columns: list[Tensor], layout: RowLayout, places: Tensor | None, count: int, address: int) -> None:
        """Stage rows so that all that were offered in this step are equally likely to be held, or the newest ones are.

        Each gets a place as in a reservoir or a ring, -1 for none; places that nobody has come in order behind the
        others.
        """
        owners, held = self._row_owners(), self._staging.count
        if self._newest:
            slots = self._ring_places(held, count)
        else:
            slots = thinned_places(self.offered, held, count, self._most, self._numbers.at(address, self._rank))
        order = np.flatnonzero(slots >= 0)
        targets, chosen = slots[order], torch.from_numpy(order)
        new = max(0, int(targets.max(initial=-1)) + 1 - held)
        self._staging.replace(targets, columns, layout, chosen if places is None else places[chosen])
        self._owners = np.concatenate((owners, np.zeros(new, dtype=np.int64)))
        self._owners[targets] = self.micro_batches - 1

    def _ring_places(self, held: int, count: int) -> IntArray:
        """Places of `count` new rows in the ring, -1 for those that newer ones would replace at once.

        Five rows after 2, for a ring of 4: the first has no place, the others take 3, 0, 1, 2; 3 is the oldest then.
        """
        start = held if held < self._most else self._oldest
        slots: IntArray = (start + np.arange(count)) % self._most
        slots[: max(0, count - self._most)] = -1
        self._oldest = (start + count) % self._most if held + count >= self._most else 0
        return slots

    def _unroll(self) -> None:
        """Put the rows of a ring in their order."""
        if not self._oldest:
            return
        order = np.roll(np.arange(self._staging.count), -self._oldest)
        self._staging.keep(order)
        self._owners, self._oldest = self._row_owners()[order], 0

    def _row_owners(self) -> IntArray:
        """The micro-batch of each row that is held, `[n]` int64."""
        if self._owners is not None:
            return self._owners
        numbers, counts = np.array(self._parts, dtype=np.int64).reshape(-1, 2).T
        return np.repeat(numbers, counts)
