"""Stages the candidates of a batch, and joins replayed rows to it.

A batch is flattened once on its way in, worked on leaf by leaf, and rebuilt once on its way out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.allocator import RecycledMemory
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.padding import Padding
from rehearsal_plugin.buffer.rows.sample_groups import SampleGroups
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.tree import FlatBatch, flatten, without
from rehearsal_plugin.errors import BatchError, CheckpointError, ConfigError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.job_report import JobReport
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.pending_losses import PendingLosses
from rehearsal_plugin.runtime.replay_account import Turn
from rehearsal_plugin.runtime.representatives import Share
from rehearsal_plugin.runtime.token_losses import token_counts
from rehearsal_plugin.strategies import Strategy

__all__ = ["BatchAugmenter", "Transform", "check_room"]

Transform: TypeAlias = Callable[[Any], Any]

NO_ROWS: Mapping[str, Tensor] = {}


class BatchAugmenter:
    """Stages candidates and joins replayed rows to batches.

    Args:
        config: The `rehearsal` section.
        strategy: What replayed rows are used for.
        coordinator: Where rows go to and come from.
        pending: Micro-batches that wait for their loss.
        report: Says what a row is, and counts what the model sees.
        transform: See `Rehearsal`.
        fill: Called before the first batch, with the device on which it lives; may fill the buffer.

    Attributes:
        padding: How rows of different length are stored; None where all have the same.
    """

    def __init__(
        self,
        config: RehearsalConfig,
        strategy: Strategy,
        coordinator: ReplayCoordinator,
        pending: PendingLosses,
        report: JobReport,
        *,
        transform: Transform | None,
        fill: Callable[[torch.device], None],
    ) -> None:
        self._config, self._strategy, self._coordinator, self._pending = config, strategy, coordinator, pending
        self._report, self._transform, self._fill = report, transform, fill
        self.padding = None if config.padding is None else Padding(config.padding)
        grouped = config.rows_per_sample > 1
        self._groups = SampleGroups(config.rows_per_sample, config.sample_layout) if grouped else None
        self._layout: RowLayout | None = None
        self._memory = RecycledMemory()

    @property
    def fed(self) -> bool:
        """Whether a batch has come yet."""
        return self._layout is not None

    def forget_layout(self) -> None:
        """Take the next batch for the first one again."""
        self._layout = None

    def augment(self, batch: Any, *, displace: bool) -> Any:
        """See `Rehearsal.augment`."""
        turn = Turn(0)
        try:
            return self._augment(batch, turn, displace=displace)
        except BaseException:  # a transform that raises, or Ctrl-C: the batch may be given again
            self._coordinator.undo(turn)
            raise

    def _augment(self, batch: Any, turn: Turn, *, displace: bool) -> Any:
        """See `augment`; `turn` notes what is to be undone."""
        flat = flatten(batch)
        stored = flat if self.padding is None else self.padding.widen(flat)
        layout = self._layout = self._layout or self._first_layout(stored)
        if self._groups is not None:
            stored = self._groups.grouped(stored, layout.names)
        columns = layout.columns(stored)
        if not self._strategy.records:
            self._coordinator.stage_candidates(columns, layout, {}, turn)  # first: rows it refuses must leave no trace
        size = turn.rows = columns[0].shape[0]
        share, displaced = self._take_share(turn, displace)
        replayed = NO_ROWS if share is None else layout.views(share.rows)
        new = size - displaced
        self._count_towards_ratio(flat, replayed, new, share, turn)
        # Only what the model sees has outputs, and it has them later, when the batch may have been changed.
        recorded = [column[:new].clone() for column in columns] if self._strategy.records else []
        keys = self._keys(layout, columns, new, replayed)
        joined = self._joined(layout, flat, replayed, displaced) if share is not None and share.count else flat
        if self._transform is not None and self._config.strategy.transform == "all":
            joined = flatten(self._transform(joined.rebuild()))
        labels = joined.get("labels")
        micro_batch = MicroBatch(
            recorded,
            new,
            share,
            self._strategy.draws,
            keys,
            labels if isinstance(labels, Tensor) else None,
            turn,
            displaced,
        )
        visible = self.visible(batch if joined is flat and not isinstance(batch, FlatBatch) else joined)
        self._count(joined, new, displaced, share, keys)
        self._pending.expect(micro_batch, layout)  # last: nothing can go wrong any more
        return visible

    def visible(self, batch: Any) -> Any:
        """See `Rehearsal.visible`."""
        nested = batch.rebuild() if isinstance(batch, FlatBatch) else batch
        return without(nested, self._config.hidden) if self._config.hidden else nested

    def _first_layout(self, batch: FlatBatch) -> RowLayout:
        """The layout of the first batch; that of rows from a checkpoint gets its nesting."""
        only = self._config.fields
        if self._groups is None:
            layout = RowLayout.infer(batch, only)
        else:
            layout, batch = self._groups.infer(batch, only)
        self._check_hidden(batch)
        self._report.log_first_batch(layout, self._coordinator.lifecycle.rank)
        first = layout.columns(batch)[0]
        if self._config.mode == "replace":
            check_room(self._config.representatives, self._strategy.draws, len(first))
        self._fill(first.device)
        if self._coordinator.prefetcher is None:
            return layout
        buffer = self._coordinator.prefetcher.buffer
        loaded, wanted = (
            {field.name: (str(field.dtype), field.shape) for field in one.fields} for one in (buffer.layout, layout)
        )
        if loaded != wanted:
            raise CheckpointError(
                f"the checkpoint holds rows of {loaded}, and the batch has {wanted}; give batches of the same fields, "
                "or start with an empty buffer"
            )
        layout = replace(layout, fields=buffer.layout.fields)  # which may be in another order
        buffer.layout = replace(layout, state=buffer.layout.state, row_bytes=buffer.layout.row_bytes)
        return layout

    def _check_hidden(self, batch: FlatBatch) -> None:
        """Refuse a name in `hidden` that the batch does not have: the model would get the field after all."""
        for name in self._config.hidden or ():
            if name not in batch.structure.places:
                nearest = get_close_matches(name, batch.names, n=1)
                raise BatchError(
                    f"rehearsal.hidden names '{name}', which the batch does not have"
                    + (f"; did you mean '{nearest[0]}'?" if nearest else f": it has {sorted(batch.names)}")
                )

    def _take_share(self, turn: Turn, displace: bool) -> tuple[Share | None, int]:
        """The replayed rows of a batch, and how many of its rows make room for them."""
        replacing = displace and self._config.mode == "replace"
        share = self._coordinator.take(turn, turn.rows if replacing else None)
        return share, share.count if share is not None and replacing else 0

    def _joined(self, layout: RowLayout, batch: FlatBatch, replayed: Mapping[str, Tensor], displaced: int) -> FlatBatch:
        """The batch with replayed rows behind it, these transformed if the strategy says so."""
        groups = self._groups
        if self.padding is not None:
            rows = replayed if groups is None else groups.rows_of(replayed)
            batch, rows = self.padding.alike(batch, rows)
            replayed = rows if groups is None else groups.samples_of(rows)
        if self._transform is not None and self._config.strategy.transform == "replayed":
            replayed = self._transformed(layout, replayed)
        if groups is None:
            return layout.join(batch, replayed, self._memory, displaced)
        joined = layout.join(groups.grouped(batch, layout.names), replayed, self._memory, displaced)
        return groups.ungrouped(joined, layout.names)

    def _transformed(self, layout: RowLayout, replayed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert self._transform is not None
        groups = self._groups
        rows = replayed if groups is None else groups.rows_of(replayed)
        flat = flatten(self._transform(layout.nesting.with_leaves(rows).rebuild()))
        rows = {name: flat[name] for name in replayed}
        return rows if groups is None else groups.samples_of(rows)

    def _count_towards_ratio(
        self, batch: FlatBatch, replayed: Mapping[str, Tensor], new: int, share: Share | None, turn: Turn
    ) -> None:
        """Count how much the model sees: `new` rows of the batch, and the replayed ones."""
        queue, rows = self._coordinator.queue, [new, 0 if share is None else share.count]
        amounts = rows
        if self._config.ratio_in == "tokens" and self.padding is not None:
            of_new = int(self.padding.lengths(batch)[:new].sum())
            amounts = [of_new, int(self.padding.lengths(replayed).sum()) if replayed else 0]
            for count, amount, is_replayed in zip(rows, amounts, (False, True), strict=True):
                queue.ratio.learn_tokens(count, amount, replayed=is_replayed)
        replacing = self._config.mode == "replace"
        size, amount = (sum(rows), sum(amounts)) if replacing else (rows[0], amounts[0])
        queue.count_micro_batch(turn, size, amount, amounts[1])

    def _keys(
        self, layout: RowLayout, columns: list[Tensor], new: int, replayed: Mapping[str, Tensor]
    ) -> IntArray | None:
        """The partition keys of all rows that the model sees, `[rows]` int64; None without partitions."""
        name = self._config.buffer.partition_by
        if name is None:
            return None
        new_keys = columns[[field.name for field in layout.fields].index(layout.field(name).name)][:new]
        parts = [new_keys, replayed[name].to(new_keys.device)] if replayed else [new_keys]
        keys: IntArray = torch.cat([part.reshape(-1).to(torch.int64) for part in parts]).cpu().numpy()
        return keys

    def _count(self, joined: FlatBatch, new: int, displaced: int, share: Share | None, keys: IntArray | None) -> None:
        metrics = self._coordinator.metrics
        self._report.rows_new += new
        tokens = token_counts(joined) if self._groups is None else None  # its rows are not in the order of samples
        if tokens is not None:
            metrics.count_tokens(tokens, new, keys)
        if share is None:
            return
        metrics.rows_replayed += share.count
        self._report.rows_replayed += share.count
        metrics.rows_displaced += displaced
        if keys is not None:
            metrics.count_replayed(keys[new:])


def check_room(representatives: int | None, draws: int, size: int) -> None:
    """Refuse to replace all rows of a batch.

    Args:
        representatives: Rows of each draw; None where a ratio tells them, which is below 1.
        draws: How many.
        size: Rows of a batch.

    Raises:
        ConfigError: No new row would be left.
    """
    if representatives is not None and representatives * draws >= size:
        raise ConfigError(
            f"rehearsal.representatives is {representatives} and a batch has {size} rows, so with rehearsal.mode "
            f"'replace' and {draws} draw(s) a step no new row would ever be seen; lower it"
        )
