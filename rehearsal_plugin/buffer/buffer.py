"""One rank's rehearsal buffer: rows of any batch, and a policy that decides which of them stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.admissions import Admissions
from rehearsal_plugin.buffer.change_tracking import Changes, TrackedStorage
from rehearsal_plugin.buffer.dedup import DUPLICATE, ContentIndex
from rehearsal_plugin.buffer.keys_and_scores import KeysAndScores
from rehearsal_plugin.buffer.policies import POLICIES, Offer
from rehearsal_plugin.buffer.policies.base import last_writers
from rehearsal_plugin.buffer.restore import RowRecords, adopt_rows, load_rows
from rehearsal_plugin.buffer.rows.fields import picked
from rehearsal_plugin.buffer.rows.layout import Packed, RowLayout
from rehearsal_plugin.buffer.slot_index import SlotIndex, kept_places
from rehearsal_plugin.buffer.storage import open_storage
from rehearsal_plugin.buffer.undo_log import UndoLog
from rehearsal_plugin.config import BufferConfig
from rehearsal_plugin.core.arrays import Float32Array, IntArray, RankArray
from rehearsal_plugin.core.rng import Purpose, RandomStream, choose_from
from rehearsal_plugin.errors import BatchError

__all__ = ["RehearsalBuffer"]


class RehearsalBuffer:
    """Rows, their slots and their partitions on one rank; it knows no other rank.

    An admission has two halves: `admit` decides, on the index alone, and `write` copies. `offer` and `sample`
    do the whole of it for use without a pipeline.

    Args:
        config: The section `rehearsal.buffer`.
        layout: How a sample becomes a row.
        rank: Keys the random numbers, and names the file of a file-backed storage.
        seed: Keys the random numbers.

    Attributes:
        capacity: Rows.
        layout: As given.

    Raises:
        ConfigError: The capacity cannot hold one row.
        StorageError: The memory or the file cannot be had.
        BatchError: `partition_by` names no field that can be a key, or `score_by` none that can be a score.
    """

    def __init__(self, config: BufferConfig, layout: RowLayout, *, rank: int = 0, seed: int = 0) -> None:
        self.layout = layout
        self.capacity = config.rows(layout.row_bytes)
        self._traits = KeysAndScores(layout, config)
        self._policy = POLICIES[config.policy]
        self._storage = TrackedStorage(open_storage(config, self.capacity, layout.row_bytes, rank), self.capacity)
        self._rank, self._deduplicates = rank, config.deduplicate
        self._records = self._empty_records()
        self._rescored: list[tuple[IntArray, Float32Array]] = []
        self._admissions, self._draws = (RandomStream(seed, purpose) for purpose in (Purpose.ADMISSION, Purpose.DRAW))
        self._calls = 0
        self._journal: UndoLog[RowRecords] | None = None

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
        return self._traits.keys(rows)

    def counts(self) -> tuple[IntArray, IntArray]:
        """Partition keys and rows stored of each, two arrays `[partitions]` int64; empty without partitions."""
        partitions = self.slot_index.partitions
        if partitions is None:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return partitions.keys, partitions.sizes

    def slots(self, keys: IntArray, index: IntArray) -> IntArray:
        """The slots `[n]` of the `index`-th rows `[n]` of the partitions with `keys` `[n]`."""
        partitions = self.slot_index.partitions
        if partitions is None:
            return index
        return partitions.slots(partitions.number(keys), index)

    @property
    def tickets(self) -> int:
        """The scores of all stored rows together, as a whole number; see `holders`."""
        values = self.slot_index.values
        return 0 if values is None else values.tickets(self.slot_index.count).total

    def holders(self, tickets: IntArray) -> IntArray:
        """The slots `[n]` that hold `tickets` `[n]` int64, numbered from 0 to those of all rows.

        A row holds tickets in proportion to its score, so that a uniform draw of tickets is a draw of rows by
        score. New scores count from the next `admit` on.
        """
        values = self.slot_index.values
        assert values is not None  # the config asks for a score
        return values.tickets(self.slot_index.count).find(tickets)

    def admit(self, rows: Tensor, step: int) -> IntArray:
        """Decide which rows stay, and where.

        Args:
            rows: `[n, row_bytes]` uint8, the offered rows in the order of the stream.
            step: Keys the random numbers; use every step once.

        Returns:
            `[n]` int64 slots, -1 for a row that is not kept, and `DUPLICATE` with `deduplicate` for one that is stored
            already and was not offered. `write` must follow before the next `read`.
        """
        self._settle()
        if self._records.contents is None:
            return self._decide(*self._traits.of_rows(rows), step)[0]
        hashes = self._records.contents.hashes(rows)
        new = np.flatnonzero(~self._records.contents.duplicates(rows, hashes, self._at))
        slots = np.full(len(rows), DUPLICATE, dtype=np.int64)
        fresh = picked(rows, None if len(new) == len(rows) else new)
        slots[new] = self._decide(*self._traits.of_rows(fresh), step)[0]
        self._records.contents.put(slots[slots >= 0], hashes[slots >= 0])
        return slots

    def write(self, slots: IntArray, rows: Tensor) -> None:
        """Copy the rows `[n, row_bytes]` that `admit` kept to their `slots` `[n]`."""
        places = kept_places(slots)
        kept = slots if places is None else slots[places]
        if len(kept):
            self._note(kept)
            if rows.device != self.device:  # only what is kept has to travel
                rows, places = picked(rows, places).to(self.device), None
            self._storage.write(kept, rows, places)

    def read(self, slots: IntArray, out: Tensor) -> None:
        """Copy the rows at `slots` `[n]` into `out` `[n, row_bytes]` uint8 on `device`, contiguous."""
        if len(slots):
            self._storage.read(slots, out)

    def written(self, slots: IntArray) -> IntArray:
        """The step in which each row at `slots` `[n]` was admitted, `[n]` int64.

        Whoever wants to update a row tells by it whether another one has taken its place.
        """
        return self._records.admissions.steps(slots)

    def origin(self, slots: IntArray) -> RankArray:
        """The rank on which each row at `slots` `[n]` was admitted, `[n]` int32."""
        return self._records.admissions.ranks(slots)

    def update_fields(self, slots: IntArray, fields: Mapping[str, Tensor]) -> None:
        """Rewrite fields of stored rows in place.

        Args:
            slots: `[n]` int64; where a slot stands twice, the last one counts.
            fields: Values `[n, ...]` by field name, of the batch or of the state.

        Raises:
            BatchError: There is no such field, or dtype or shape are not its own.
        """
        known = {field.name: field for field in (*self.layout.fields, *self.layout.state)}
        for name in fields:
            if name not in known:
                raise BatchError(f"rows have no field '{name}'; they have {sorted(known)}")
            known[name].check(fields[name], len(slots))
        last = last_writers(slots) >= 0
        index = torch.from_numpy(np.flatnonzero(last))
        rows = self._at(slots[last])
        for name, values in fields.items():
            known[name].view(rows).copy_(values[index.to(values.device)])
        self.write(slots[last], rows)
        if self._records.contents is not None and any(field.name in fields for field in self.layout.fields):
            self._records.contents.put(slots[last], self._records.contents.hashes(rows))
        judged = self._traits.value
        if judged is not None and judged.name in fields:
            new = self._traits.values(rows)
            assert new is not None
            self._rescored.append((slots[last], new))

    def commit(self) -> None:
        """Make the present state the one that `rollback` returns to, until the next commit."""
        self._settle()
        self._journal = UndoLog(self._storage, len(self), self._records)

    def rollback(self) -> None:
        """Return to the state of the last `commit`, row by row; a buffer without one becomes empty."""
        self._rescored.clear()
        self._records = self._empty_records() if self._journal is None else self._journal.undo()

    def state_dict(self) -> dict[str, Any]:
        """All rows and the index, as tensors, arrays and numbers; views where that is possible."""
        self._settle()
        count = self.slot_index.count
        return {
            "rows": self._storage.first(count),
            "written": self._records.admissions.steps(slice(count)),
            "origin": self._records.admissions.ranks(slice(count)),
            "calls": self._calls,
            "index": self.slot_index.state_dict(),
        }

    def take_changed(self) -> IntArray:
        """The slots `[n]` whose rows are not those that they were at the last call; all of them at the first."""
        return self._storage.take_changed(len(self))

    def follow(self) -> Changes:
        """An account of one's own of the slots whose rows change; all that are taken count at its first `take`."""
        return self._storage.follow()

    def unfollow(self, changes: Changes) -> None:
        """Keep an account that `follow` gave no longer."""
        self._storage.unfollow(changes)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave for a buffer of the same config, into an empty one.

        Raises:
            ValueError: It contradicts itself.
        """
        load_rows(self._records, state, self.layout.row_bytes, self.write)
        self._calls = int(state["calls"])

    def adopt(self, parts: Iterable[Tensor], written: IntArray, origin: RankArray, offered: Mapping[int, int]) -> None:
        """Fill an empty buffer with rows of others.

        Args:
            parts: `[n, row_bytes]` uint8 each, together at most `capacity`, in the order in which they were admitted.
            written: `[rows]` int64, the step in which each was.
            origin: `[rows]` int32, the rank on which it was.
            offered: Rows offered so far of each partition key, or of key 0 without partitions; no less than there are
                rows.

        Raises:
            ValueError: It contradicts itself.
        """
        adopt_rows(self._records, self._traits, parts, written, origin, offered, self.write)

    def offer(self, batch: Any) -> int:
        """Offer all samples of a batch; returns how many were kept.

        Raises:
            BatchError: The batch does not fit the layout, as where rows have state beside it.
        """
        columns = self.layout.columns(batch)
        size = columns[0].shape[0]
        if self.layout.state:
            columns += self.layout.state_columns({}, size)
        if self._records.contents is None:
            return self._offer(columns)
        rows = self._rows(size)
        self.layout.pack(columns, rows)
        slots = self.admit(rows, self._next())
        self.write(slots, rows)
        return int(np.count_nonzero(slots >= 0))

    def sample(self, count: int, out: Packed | None = None) -> Any:
        """A batch of `count` rows drawn uniformly without replacement, or of all rows if there are fewer.

        Args:
            count: Rows.
            out: Where to put them, as `room` gave it for as many: the batch returned is the one in there, overwritten
                by the next call. Large batches come several times faster than into fresh memory.
        """
        count = min(count, self.slot_index.count)
        slots = choose_from(self.slot_index.count, count, self._draws.at(self._next(), self._rank))
        if out is None or len(out.rows) != count:
            out = self.room(count)
        self.read(slots, out.rows)
        return out.batch

    def room(self, count: int) -> Packed:
        """Memory for `count` rows, and the batch that lies in it; see `sample`."""
        return self.layout.packed(self._rows(count))

    def _empty_records(self) -> RowRecords:
        content_bytes = self.layout.row_bytes - self.layout.state_bytes
        traits = self._traits
        return RowRecords(
            SlotIndex(self.capacity, traits.key is not None, traits.width, means=traits.features),
            Admissions(self.capacity, self._rank),
            ContentIndex(self.capacity, content_bytes) if self._deduplicates else None,
        )

    def _at(self, slots: IntArray) -> Tensor:
        """The rows `[n, row_bytes]` at `slots` `[n]`."""
        rows = self._rows(len(slots))
        self.read(slots, rows)
        return rows

    def _offer(self, columns: list[Tensor]) -> int:
        """Offer rows of which nothing but a key and a value has to be looked at: they are copied once."""
        self._settle()
        slots, kept = self._decide(*self._traits.of_columns(columns), self._next())
        if len(kept):
            self._note(kept)
            self._storage.write_fields(kept, self.layout.fields, columns, None if kept is slots else kept_places(slots))
        return len(kept)

    def _decide(self, keys: IntArray, values: Float32Array | None, step: int) -> tuple[IntArray, IntArray]:
        """The slots `[n]` of rows by partition key `[n]` and value `[n, width]`, -1 for none; and those without -1."""
        partitions = self.slot_index.partitions
        owners = keys if partitions is None else partitions.number(keys)
        slots = self._policy(self.slot_index, Offer(owners, values), self._admissions.at(step, self._rank))
        kept = self.slot_index.record(slots, owners, values)
        self._records.admissions.note(kept, step)
        return slots, kept

    def _note(self, slots: IntArray) -> None:
        """Have the journal keep what is about to be overwritten."""
        if self._journal is not None:
            self._journal.note(slots)

    def _settle(self) -> None:
        """Let new scores count; not in the middle of a step, whose draw goes by what this rank told the others."""
        for slots, values in self._rescored:
            if self.slot_index.values is not None:
                self.slot_index.values.set(slots, values)
        self._rescored.clear()

    def _rows(self, count: int) -> Tensor:
        return torch.zeros((count, self.layout.row_bytes), dtype=torch.uint8, device=self.device)

    def _next(self) -> int:
        self._calls += 1
        return self._calls
