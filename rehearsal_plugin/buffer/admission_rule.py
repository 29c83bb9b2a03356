"""The first half of an admission: which of the offered rows stay, and at which slots."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.dedup import DUPLICATE
from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.policies.base import Offer, Policy
from rehearsal_plugin.buffer.row_records import RowRecords
from rehearsal_plugin.buffer.rows.fields import pick_rows
from rehearsal_plugin.core.arrays import Float32Array, IntArray
from rehearsal_plugin.core.rng import RandomStream

__all__ = ["AdmissionRule"]


class AdmissionRule:
    """Decides by a policy, and records the decision. The bytes of rows are read, but not written.

    Args:
        policy: Chooses slots.
        keys_and_scores: Finds what the policy goes by.
        numbers: Random numbers of every step.
        rank: Keys the random numbers.
    """

    def __init__(self, policy: Policy, keys_and_scores: KeysAndScores, numbers: RandomStream, rank: int) -> None:
        self._policy, self._keys_and_scores = policy, keys_and_scores
        self._numbers, self._rank = numbers, rank

    def admit_rows(
        self, records: RowRecords, rows: Tensor, step: int, read_rows: Callable[[IntArray], Tensor]
    ) -> IntArray:
        """Decide on packed rows.

        Args:
            records: Of the rows stored; changed.
            rows: `[n, row_bytes]` uint8.
            step: Keys the random numbers.
            read_rows: Returns the stored rows `[m, row_bytes]` at slots `[m]`, to compare contents.

        Returns:
            `[n]` int64 slots, -1 for a row that is not kept, `DUPLICATE` for one that is stored already.
        """
        if records.contents is None:
            return self.decide_slots(records, *self._keys_and_scores.of_rows(rows), step)[0]
        hashes = records.contents.hashes(rows)
        new = np.flatnonzero(~records.contents.duplicates(rows, hashes, read_rows))
        slots = np.full(len(rows), DUPLICATE, dtype=np.int64)
        fresh = pick_rows(rows, None if len(new) == len(rows) else new)
        slots[new] = self.decide_slots(records, *self._keys_and_scores.of_rows(fresh), step)[0]
        records.contents.put(slots[slots >= 0], hashes[slots >= 0])
        return slots

    def admit_columns(self, records: RowRecords, columns: list[Tensor], step: int) -> tuple[IntArray, IntArray]:
        """Decide on samples whose fields lie in `columns` `[n, *shape]`, duplicates or not; see `decide_slots`."""
        return self.decide_slots(records, *self._keys_and_scores.of_columns(columns), step)

    def decide_slots(
        self, records: RowRecords, keys: IntArray, scores: Float32Array | None, step: int
    ) -> tuple[IntArray, IntArray]:
        """The slots `[n]` of rows by partition key `[n]` and score `[n, width]`, -1 for none; and those without -1."""
        index = records.slot_index
        owners = keys if index.partitions is None else index.partitions.number(keys)
        slots = self._policy(index, Offer(owners, scores), self._numbers.at(step, self._rank))
        kept = index.record(slots, owners, scores)
        records.admissions.note_admission(kept, step)
        return slots, kept
