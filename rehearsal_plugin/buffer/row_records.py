"""Everything that a buffer knows of its rows, besides their bytes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rehearsal_plugin.buffer.admissions import Admissions
from rehearsal_plugin.buffer.dedup import ContentIndex
from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.slot_index import SlotIndex
from rehearsal_plugin.core.arrays import Float32Array, IntArray

__all__ = ["RowRecords"]


class RowRecords(NamedTuple):
    """Where rows lie, and when, where and with which content they came: a rollback takes all of it back at once.

    Attributes:
        slot_index: Slots in use, their partitions and their scores.
        admissions: Step and rank of admission of each row.
        contents: Hashes of the rows' content; None unless duplicates are refused.
    """

    slot_index: SlotIndex
    admissions: Admissions
    contents: ContentIndex | None

    @classmethod
    def empty(
        cls,
        capacity: int,
        rank: int,
        keys_and_scores: KeysAndScores,
        content_bytes: int | None = None,
        ranks: int = 1,
    ) -> RowRecords:
        """The records of no rows.

        Args:
            capacity: Slots.
            rank: The one that admits rows.
            keys_and_scores: Tells whether rows have partitions and scores.
            content_bytes: The first bytes of a row, which make up its content; None where duplicates are welcome.
            ranks: How many ranks share the buffer.
        """
        partitioned, place = keys_and_scores.key_field is not None, rank / ranks % 1 if ranks > 1 else None
        width, means = keys_and_scores.width, keys_and_scores.features
        return cls(
            SlotIndex(capacity, partitioned, width, means=means, place=place),
            Admissions(capacity, rank),
            None if content_bytes is None else ContentIndex(capacity, content_bytes),
        )

    def postpone_scores(self, slots: IntArray, scores: Float32Array | None) -> None:
        """Give the rows at `slots` `[n]` new scores `[n, width]` at the next `settle_scores`."""
        if self.slot_index.scores is not None and scores is not None:
            self.slot_index.scores.postpone(slots, scores)

    def settle_scores(self) -> None:
        """Let postponed scores count; not within a step, as other ranks draw by the scores announced to them."""
        if self.slot_index.scores is not None:
            self.slot_index.scores.settle()

    def note_contents(self, slots: IntArray, rows: Tensor) -> None:
        """Note the content of the rows `[n, row_bytes]` that are now at `slots` `[n]`, if anybody looks for it."""
        if self.contents is not None:
            self.contents.put(slots, self.contents.hashes(rows))
