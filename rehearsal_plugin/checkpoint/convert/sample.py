"""A uniform sample of a stream of rows, written as a checkpoint that a new job begins with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rehearsal_plugin.buffer.policies.reservoir import algorithm_r
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.checkpoint.format import RankFile, list_files, write_file
from rehearsal_plugin.checkpoint.lazy_rows import LazyRows
from rehearsal_plugin.checkpoint.record import Record, RowSet, pack_record
from rehearsal_plugin.checkpoint.reshard import deal_rows
from rehearsal_plugin.core.rng import Purpose, generator
from rehearsal_plugin.errors import BatchError, CheckpointError, DataError

__all__ = ["Sample"]

UNLIMITED = 1 << 50


class Sample:
    """A uniform sample of all rows offered so far, held in memory.

    Args:
        rows: Size of the sample; None keeps all rows.
        fields: Names of the fields that make up a row; None takes all.
        constants: Integer fields that are added to every row, by name.
        seed: Seed of the random numbers.

    Attributes:
        offered: Number of rows offered so far.
    """

    def __init__(
        self,
        rows: int | None = None,
        *,
        fields: Collection[str] | None = None,
        constants: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.offered = 0
        self._most, self._fields = UNLIMITED if rows is None else rows, fields
        self._constants = dict(constants or {})
        self._rng = generator(seed, Purpose.SEEDING, 0)
        self._layout: RowLayout | None = None
        self._rows = torch.zeros((0, 0), dtype=torch.uint8, device="cpu")

    def __len__(self) -> int:
        return min(self.offered, self._most)

    def offer(self, batch: Mapping[str, Tensor]) -> None:
        """Offer rows, one tensor `[n, ...]` a field.

        Raises:
            DataError: A field that was asked for is missing, or a constant has the name of one.
            BatchError: The fields are not those of the first batch.
        """
        columns = self._layout_of(batch).columns(self._with_constants(batch))
        packed = torch.zeros((len(columns[0]), self._rows.shape[1]), dtype=torch.uint8, device="cpu")
        self._layout_of(batch).pack(columns, packed)
        slots = algorithm_r(self.offered, len(packed), self._most, self._rng)
        self.offered += len(packed)
        self._grow_rows()
        kept = np.flatnonzero(slots >= 0)
        self._rows[torch.from_numpy(slots[kept])] = packed[torch.from_numpy(kept)]

    def save(self, folder: Path, ranks: int = 1, seen: int | None = None, source: str = "data") -> None:
        """Write the rows as a checkpoint of step 0.

        Args:
            folder: Created if it is missing.
            ranks: Number of files that share the rows.
            seen: Rows that the sample stands for, at least its own size; None for all that were offered.
            source: Origin of the rows, shown by `rehearsal inspect`.

        Raises:
            CheckpointError: The folder holds checkpoints already, or cannot be written.
            DataError: There are no rows, or `seen` is below the number of rows.
        """
        if self._layout is None or not len(self):
            raise DataError("there are no rows to begin with: the data holds none, or less than one of this length")
        if seen is not None and seen < len(self):
            raise DataError(f"{len(self)} rows cannot stand for {seen}; give at least as many")
        if list_files(folder):
            raise CheckpointError(f"{folder} holds checkpoints already; give a new folder, so that nothing is lost")
        key = next(iter(self._constants.values()), 0)
        zeros = np.zeros(len(self), dtype=np.int64)
        rows = RowSet(
            self._layout,
            LazyRows.of(self._rows[: len(self)]),
            zeros,
            zeros.astype(np.int32),
            np.full_like(zeros, key),
            {key: self.offered if seen is None else seen},
        )
        job = {"policy": "reservoir", "strategy": "er", "records": False, "seeded_from": source}
        for rank in range(ranks):
            stretches = deal_rows([len(self)], rank, ranks)
            share = rows.select(np.concatenate([np.arange(0), *(np.arange(s.start, s.stop) for s in stretches)]))
            record = Record(job, rows.layout, "cpu", share.buffer_state(), None)
            write_file(folder, RankFile(0, ranks, rank), pack_record(record))

    def _layout_of(self, batch: Mapping[str, Tensor]) -> RowLayout:
        if self._layout is None:
            try:
                self._layout = RowLayout.infer(self._with_constants(batch))
            except BatchError as error:
                raise DataError(str(error)) from error
            self._rows = torch.zeros((0, self._layout.row_bytes), dtype=torch.uint8, device="cpu")
        return self._layout

    def _with_constants(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The chosen fields of a batch, and the constant ones."""
        names = list(batch) if self._fields is None else [name for name in batch if name in self._fields]
        missing = sorted({*(self._fields or ())} - set(batch))
        if missing:
            raise DataError(f"there are no fields {missing}; the data has {sorted(batch)}")
        twice = sorted(set(names) & set(self._constants))
        if twice:
            raise DataError(f"the data has fields {twice} already; give a partition another name")
        count = len(next(iter(batch.values()))) if batch else 0
        constants = {name: torch.full((count,), value, device="cpu") for name, value in self._constants.items()}
        return {name: batch[name] for name in names} | constants

    def _grow_rows(self) -> None:
        if len(self._rows) < len(self):
            larger = self._rows.new_zeros((min(self._most, max(len(self), 2 * len(self._rows))), self._rows.shape[1]))
            larger[: len(self._rows)] = self._rows
            self._rows = larger
