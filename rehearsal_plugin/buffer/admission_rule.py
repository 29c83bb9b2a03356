"""The first half of an admission: which of the offered rows stay, and at which slots."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from rehearsal_plugin.buffer.dedup import DUPLICATE
from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.partitions import count_earlier
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
        newest: Whether the policy keeps the newest rows.
    """

    def __init__(
        self, policy: Policy, keys_and_scores: KeysAndScores, numbers: RandomStream, rank: int, *, newest: bool = False
    ) -> None:
        self._policy, self._keys_and_scores, self._newest = policy, keys_and_scores, newest
        self._numbers, self._rank = numbers, rank

    def admit_rows(
        self,
        records: RowRecords,
        rows: Tensor,
        step: int,
        read_rows: Callable[[IntArray], Tensor],
        offered: int | None = None,
    ) -> IntArray:
        """Decide on packed rows.

        Args:
            records: Of the rows stored; changed.
            rows: `[n, row_bytes]` uint8.
            step: Keys the random numbers.
            read_rows: Returns the stored rows `[m, row_bytes]` at slots `[m]`, to compare contents.
            offered: See `RehearsalBuffer.admit`.

        Returns:
            `[n]` int64 slots, -1 for a row that is not kept, `DUPLICATE` for one that is stored already.
        """
        if records.contents is None:
            return self._decide_on_rows(records, rows, step, offered or len(rows))
        hashes = records.contents.hashes(rows)
        new = np.flatnonzero(~records.contents.duplicates(rows, hashes, read_rows))
        slots = np.full(len(rows), DUPLICATE, dtype=np.int64)
        fresh = pick_rows(rows, None if len(new) == len(rows) else new)
        beyond = 0 if offered is None else (offered - len(rows)) * len(new) // max(1, len(rows))
        slots[new] = self._decide_on_rows(records, fresh, step, len(new) + beyond)
        records.contents.put(slots[slots >= 0], hashes[slots >= 0])
        return slots

    def admit_columns(self, records: RowRecords, columns: list[Tensor], step: int) -> tuple[IntArray, IntArray]:
        """Decide on samples whose fields lie in `columns` `[n, *shape]`, duplicates or not; see `decide_slots`."""
        return self.decide_slots(records, *self._keys_and_scores.of_columns(columns), step)

    def _decide_on_rows(self, records: RowRecords, rows: Tensor, step: int, offered: int) -> IntArray:
        """The slots `[n]` of packed rows `[n, row_bytes]` out of `offered` ones, -1 for none."""
        keys, scores = self._keys_and_scores.of_rows(rows)
        if offered <= len(keys) or not len(keys):
            return self.decide_slots(records, keys, scores, step)[0]
        return self._decide_on_sample(records, keys, scores, step, offered)

    def _decide_on_sample(
        self, records: RowRecords, keys: IntArray, scores: Float32Array | None, step: int, offered: int
    ) -> IntArray:
        """The slots `[n]` of a sample of more rows that were offered, -1 for none.

        The policy decides on as many rows as were offered: those of the sample, and copies of some in place of the
        others, in random order. Where it keeps a row, a row of the sample with the same owner is stored, each at most
        once. For example, 5 rows were offered and rows 0, 1, 2 are the sample, of the owners a, a, b::

            copies    1  0  2  0  1       slots by the policy   7 -1 -1  4 -1      (kept: two rows of a)
            sample    0  1  2             slots                 7  4 -1

        A policy that compares the features of rows sees the sample only: copies would count as other rows. With a
        policy that keeps the newest rows, the sample is these, in their order, behind the copies.
        """
        index, rng = records.slot_index, self._numbers.at(step, self._rank)
        owners = keys if index.partitions is None else index.partitions.number(keys)
        held = len(owners)
        copies = np.concatenate((np.arange(held), rng.integers(held, size=offered - held)))
        thinned = owners[copies[held:]]
        slots = np.full(held, -1, dtype=np.int64)
        if self._keys_and_scores.features:
            slots = self._policy(index, Offer(owners, scores), rng)
        elif self._newest:
            order = np.concatenate((copies[held:], np.arange(held)))
            slots = self._policy(index, Offer(owners[order], None if scores is None else scores[order]), rng)[-held:]
        else:
            rng.shuffle(copies)
            decided = self._policy(index, Offer(owners[copies], None if scores is None else scores[copies]), rng)
            kept = np.flatnonzero(decided >= 0)
            places = _distinct_places(owners[copies[kept]], owners, rng)
            slots[places] = decided[kept]
        records.admissions.note_admission(index.record(slots, owners, scores), step)
        index.count_thinned(thinned)
        return slots

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


def _distinct_places(wanted: IntArray, owners: IntArray, rng: np.random.Generator) -> IntArray:
    """Places `[k]` in `owners` `[n]`, n >= k, each once: of rows of the owners `wanted` `[k]`, while there are any.

    >>> sorted(_distinct_places(np.array([1, 1, 0]), np.array([1, 0, 0]), np.random.default_rng(0)).tolist())
    [0, 1, 2]
    """
    order = rng.permutation(len(owners))
    order = order[owners[order].argsort(kind="stable")]  # by owner, at random within each
    ordered = owners[order]
    earlier = count_earlier(wanted)
    at = ordered.searchsorted(wanted) + earlier
    fits = at < ordered.searchsorted(wanted, side="right")
    places = np.empty(len(wanted), dtype=np.int64)
    places[fits] = order[at[fits]]
    places[~fits] = np.setdiff1d(order, places[fits], assume_unique=True)[: np.count_nonzero(~fits)]
    return places
