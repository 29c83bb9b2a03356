"""One rank's rehearsal buffer: rows of any batch, and a policy that decides which of them stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.admission_rule import AdmissionRule
from rehearsal_plugin.buffer.change_tracking import Changes, TrackedStorage
from rehearsal_plugin.buffer.field_updates import updated_rows
from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.policies import POLICIES
from rehearsal_plugin.buffer.restore import adopt_rows, load_rows, rows_state
from rehearsal_plugin.buffer.row_reader import RowReader
from rehearsal_plugin.buffer.row_records import RowRecords
from rehearsal_plugin.buffer.rows.layout import Packed, RowLayout
from rehearsal_plugin.buffer.slot_index import SlotIndex, kept_places
from rehearsal_plugin.buffer.trimmed_storage import open_rows, slots_for
from rehearsal_plugin.buffer.undo_log import UndoLog
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.core.arrays import IntArray, RankArray
from rehearsal_plugin.core.rng import Purpose, RandomStream, choose_from

__all__ = ["RehearsalBuffer"]


class RehearsalBuffer:
    """Rows, their slots and their partitions on one rank; it knows no other rank.

    An admission has two halves: `admit` decides, on the index alone, and `write` copies. `offer` and `sample`
    are complete, for use without a pipeline.

    There is no lock. With a pipeline, calls are kept apart by the step: a background job is submitted after
    `admit`, and collected before anything else is called on the training thread.

    | call | thread |
    |---|---|
    | `admit`, `commit`, `rollback`, `state_dict`, `load_state_dict`, `adopt` | training, no job in flight |
    | `take_changed`, `follow`, `unfollow` | training |
    | `counts` | background; training with `exchange.launch: inline`, before the job is submitted |
    | `write`, `update_fields`, `slots` | background; `update_fields` also training, no job in flight |
    | `read`, `written`, `origin`, `keys` | either: a search reads rows while the job may be writing others |

    Args:
        config: The section `rehearsal.buffer`.
        layout: How a sample becomes a row.
        rank: Keys the random numbers, and names the file of a file-backed storage.
        ranks: How many ranks share the distributed buffer.
        seed: Keys the random numbers.

    Attributes:
        capacity: Rows.
        layout: As given; that of the batches, once a job goes on with others.
        stored_layout: As given, by which rows are stored.
        budget: Tells when rows of different length have used up a capacity in bytes; None for any other.

    Raises:
        ConfigError: The capacity holds no row.
        StorageError: The memory or the file cannot be had.
        BatchError: `partition_by` names no field that can be a key, or `score_by` none that can be a score.
    """

    def __init__(
        self, config: BufferConfig, layout: RowLayout, *, rank: int = 0, ranks: int = 1, seed: int = 0
    ) -> None:
        self.layout = layout
        self.capacity = slots_for(config, layout)
        self._keys_and_scores = KeysAndScores(layout, config)
        policy, numbers = POLICIES[config.policy], RandomStream(seed, Purpose.ADMISSION)
        self._rule = AdmissionRule(policy, self._keys_and_scores, numbers, rank, newest=policy.newest)
        self._storage = TrackedStorage(open_rows(config, layout, rank), self.capacity)
        self.budget = None if self._storage.trimmed is None else self._storage.trimmed.budget
        self._rank, self._ranks, self.stored_layout = rank, ranks, layout
        self._content_bytes = layout.row_bytes - layout.state_bytes if config.deduplicate else None
        self._records = self._empty_records()
        self._draw_numbers, self._calls = RandomStream(seed, Purpose.DRAW), 0
        self._undo_log: UndoLog[RowRecords] | None = None

    def __len__(self) -> int:
        return self.slot_index.count

    @property
    def slot_index(self) -> SlotIndex:
        """Slots in use, their partitions and their scores; read it, do not change it."""
        return self._records.slot_index

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self._storage.device

    def keys(self, rows: Tensor) -> IntArray:
        """The partition keys `[n]` int64 of packed rows `[n, row_bytes]`; zeros without partitions."""
        return self._keys_and_scores.keys(rows)

    def counts(self) -> tuple[IntArray, IntArray]:
        """Partition keys and rows stored of each, two arrays `[partitions]` int64; empty without partitions."""
        return self.slot_index.counts()

    def slots(self, keys: IntArray, index: IntArray) -> IntArray:
        """The slots `[n]` of the `index`-th rows `[n]` of the partitions with `keys` `[n]`."""
        return self.slot_index.slots(keys, index)

    def admit(self, rows: Tensor, step: int, offered: int | None = None) -> IntArray:
        """Decide which rows stay, and where.

        Args:
            rows: `[n, row_bytes]` uint8, the offered rows in the order of the stream.
            step: Keys the random numbers; use every step once.
            offered: How many were offered, where `rows` are no fewer than `capacity` of them: a uniform sample, or the
                newest with a policy that keeps these.

        Returns:
            `[n]` int64 slots, -1 for a row that is not kept, and `DUPLICATE` with `deduplicate` for one that is stored
            already and was not offered. `write` must follow before the next `read`.
        """
        self._before_admission()
        return self._rule.admit_rows(self._records, rows, step, self._rows_at, offered)

    def write(self, slots: IntArray, rows: Tensor, bounds: IntArray | None = None) -> None:
        """Copy the rows `[n, row_bytes]` that `admit` kept to their `slots` `[n]`; `bounds` are as in `BoundedRows`."""
        places = kept_places(slots)
        if len(kept := slots if places is None else slots[places]):
            self._save_old_rows(kept)
            same = self.layout.pads == self.stored_layout.pads  # but for batches of a job that goes on
            self._storage.write_kept(kept, rows, places, bounds if same else None)

    def read(self, slots: IntArray, out: Tensor) -> None:
        """Copy the rows at `slots` `[n]` into `out` `[n, row_bytes]` uint8 on `device`, contiguous."""
        if len(slots):
            self._storage.read(slots, out)

    @property
    def longest(self) -> int | None:
        """Positions of the longest row that was ever stored; None where that, or their padding now, is not known."""
        known = self._storage.trimmed if self.layout.pads == self.stored_layout.pads else None
        return None if known is None else known.longest

    def reader(self, packed: RowLayout | None = None) -> RowReader:
        """Reads rows to memory that is used again; `packed` as in `RowReader`."""
        return RowReader(self._storage, self._storage.trimmed, self.stored_layout, packed)

    def written(self, slots: IntArray) -> IntArray:
        """The step in which each row at `slots` `[n]` was admitted, `[n]` int64.

        If it is another one than before, another row has taken the place: an update meant for the first is late.
        """
        return self._records.admissions.steps(slots)

    def origin(self, slots: IntArray) -> RankArray:
        """The rank on which each row at `slots` `[n]` was admitted, `[n]` int32."""
        return self._records.admissions.ranks(slots)

    def update_fields(self, slots: IntArray, fields: Mapping[str, Tensor]) -> None:
        """Rewrite fields of stored rows in place; new scores count from the next `admit` on.

        Args:
            slots: `[n]` int64; where a slot stands twice, the last one counts.
            fields: Values `[n, ...]` by field name.

        Raises:
            BatchError: See `updated_rows`.
        """
        slots, rows = updated_rows(self.layout, slots, fields, self._rows_at)
        self.write(slots, rows)
        if any(field.name in fields for field in self.layout.fields):
            self._records.note_contents(slots, rows)
        score_field = self._keys_and_scores.score_field
        if score_field is not None and score_field.name in fields:
            self._records.postpone_scores(slots, self._keys_and_scores.scores(rows))

    def commit(self) -> None:
        """Make the present state the one that `rollback` returns to, until the next commit."""
        self._records.settle_scores()
        self._undo_log = UndoLog(self._storage, len(self), self._records)

    def rollback(self) -> None:
        """Return to the state of the last `commit`, row by row; a buffer without one becomes empty."""
        self._records = self._empty_records() if self._undo_log is None else self._undo_log.undo()

    def take_changed(self) -> IntArray:
        """The slots `[n]` whose rows have changed since the last call; all of them at the first."""
        return self._storage.take_changed(len(self))

    def follow(self) -> Changes:
        """A record of the slots that change from now on, for one reader; its first `take` returns all slots."""
        return self._storage.follow()

    def unfollow(self, changes: Changes) -> None:
        """Give up a record that `follow` returned."""
        self._storage.unfollow(changes)

    def state_dict(self) -> dict[str, Any]:
        """All rows and the index, as tensors, arrays and numbers; views where that is possible."""
        self._records.settle_scores()
        return rows_state(self._records, self._storage.first(len(self)), self._calls)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned for a buffer of the same config, into an empty one.

        Raises:
            ValueError: The state contradicts itself.
        """
        load_rows(self._records, state, self.layout.row_bytes, self.write)
        self._calls = int(state["calls"])

    def adopt(self, parts: Iterable[Tensor], written: IntArray, origin: RankArray, offered: Mapping[int, int]) -> None:
        """Fill an empty buffer with rows of other ranks or jobs.

        Args:
            parts: `[n, row_bytes]` uint8 each, together at most `capacity`, in the order in which they were admitted.
            written: `[rows]` int64, the step in which each was.
            origin: `[rows]` int32, the rank on which it was.
            offered: Rows offered so far of each partition key, or of key 0 without partitions; no less than there are
                rows.

        Raises:
            ValueError: There is not one step and one rank for each row.
        """
        adopt_rows(self._records, self._keys_and_scores, parts, written, origin, offered, self.write)

    def offer(self, batch: Any) -> int:
        """Offer all samples of a batch; returns how many were kept.

        Raises:
            BatchError: The batch does not fit the layout, as where rows have state beside it.
        """
        columns = self.layout.columns(batch)
        if self.layout.state:
            columns += self.layout.state_columns({}, len(columns[0]))
        if self._records.contents is None:
            return self._offer_columns(columns)
        rows = self._zero_rows(len(columns[0]))
        self.layout.pack(columns, rows)
        slots = self.admit(rows, self._next_call())
        self.write(slots, rows)
        return int(np.count_nonzero(slots >= 0))

    def sample(self, count: int, out: Packed | None = None) -> Any:
        """A batch of `count` rows drawn uniformly without replacement, or of all rows if there are fewer.

        Args:
            count: Rows.
            out: Where to put them, as `room` returned it: the batch in there is returned, and overwritten by the next
                call. Large batches come several times faster than into fresh memory.
        """
        count = min(count, len(self))
        slots = choose_from(len(self), count, self._draw_numbers.at(self._next_call(), self._rank))
        out = self.room(count) if out is None or len(out.rows) != count else out
        self.read(slots, out.rows)
        return out.batch

    def room(self, count: int) -> Packed:
        """Memory for `count` rows, and the batch that lies in it; see `sample`."""
        return self.layout.packed(self._zero_rows(count))

    def _before_admission(self) -> None:
        """Let new scores count, and take the buffer for full once its rows have taken their bytes."""
        self._records.settle_scores()
        if self.budget is not None and self.budget.is_used_up():
            self.slot_index.close_free_slots()

    def _empty_records(self) -> RowRecords:
        return RowRecords.empty(self.capacity, self._rank, self._keys_and_scores, self._content_bytes, self._ranks)

    def _offer_columns(self, columns: list[Tensor]) -> int:
        """Offer samples that are copied once, from `columns` to their slots: only key and score are looked at."""
        self._before_admission()
        slots, kept = self._rule.admit_columns(self._records, columns, self._next_call())
        if len(kept):
            self._save_old_rows(kept)
            self._storage.write_fields(kept, self.layout.fields, columns, None if kept is slots else kept_places(slots))
        return len(kept)

    def _save_old_rows(self, slots: IntArray) -> None:
        """Keep the rows at `slots` `[n]`, about to be overwritten, for `rollback`."""
        if self._undo_log is not None:
            self._undo_log.save_rows(slots)

    def _rows_at(self, slots: IntArray) -> Tensor:
        """The rows `[n, row_bytes]` at `slots` `[n]`."""
        rows = self._zero_rows(len(slots))
        self.read(slots, rows)
        return rows

    def _zero_rows(self, count: int) -> Tensor:
        return torch.zeros((count, self.layout.row_bytes), dtype=torch.uint8, device=self.device)

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls
