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

from rehearsal_plugin.buffer.rows.batch_form import BatchForm, GroupForm, RowForm
from rehearsal_plugin.buffer.rows.block_masks import BlockMaskForm, block_mask_of
from rehearsal_plugin.buffer.rows.documents import DocumentForm
from rehearsal_plugin.buffer.rows.flat_rows import boundaries_of, has_documents, lengths_of
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.padding import Padding, longest_for
from rehearsal_plugin.buffer.rows.passing_leaves import refuse_left_behind
from rehearsal_plugin.buffer.rows.sample_groups import SampleGroups
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.config.by_row import settings_by_output
from rehearsal_plugin.config.names import PARTITION
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.tree import FlatBatch, flatten, without
from rehearsal_plugin.errors import BEGIN_EMPTY, BatchError, CheckpointError, ConfigError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.job_report import JobReport
from rehearsal_plugin.runtime.joined_batches import JoinedBatches
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.pending_losses import PendingLosses
from rehearsal_plugin.runtime.replay_account import Turn
from rehearsal_plugin.runtime.representatives import Share
from rehearsal_plugin.runtime.token_losses import counted_tokens
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
        self._form: BatchForm = RowForm(None)  # until the first batch
        self._layout: RowLayout | None = None
        self._joined_before = JoinedBatches()

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
        self._joined_before.refuse(flat)
        layout = self._layout = self._layout or self._first_layout(flat)
        columns = layout.columns(self._form.samples(flat, layout), narrow=True)
        if not self._strategy.records:
            self._coordinator.stage_candidates(columns, layout, {}, turn)  # first: rows it refuses must leave no trace
        size = turn.rows = columns[0].shape[0]
        share, displaced = self._take_share(turn, displace)
        replayed = NO_ROWS if share is None else share.fields(layout)
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
            self._form.by_row(joined),
            self._tokens(joined),
            self._form.lengths(joined) if self._pending.must_be_asked else None,
        )
        self._joined_before.note(joined, flat, layout)
        visible = self.visible(batch if joined is flat and not isinstance(batch, FlatBatch) else joined)
        self._report.count_micro_batch(micro_batch, self._coordinator.metrics)
        self._pending.expect(micro_batch, layout)  # last: nothing can go wrong any more
        return visible

    def visible(self, batch: Any) -> Any:
        """See `Rehearsal.visible`."""
        nested = batch.rebuild() if isinstance(batch, FlatBatch) else batch
        return without(nested, self._config.hidden) if self._config.hidden else nested

    def _first_layout(self, batch: FlatBatch) -> RowLayout:
        """The layout of the first batch; that of rows from a checkpoint gets its nesting."""
        if self.padding is not None:
            self.padding.length = self.padding.length or self._loaded_length()
        self._form = self._with_block_mask(self._form_of(batch), batch)
        layout, batch = self._form.infer(batch, self._config.fields)
        if self._config.buffer.partition is not None:
            layout = layout.with_constant(PARTITION, self._config.buffer.partition)
        self._check_hidden(batch)
        self._report.log_first_batch(layout, self._coordinator.lifecycle.rank)
        first = layout.columns(batch)[0]
        if self._config.mode == "replace":
            check_room(self._config.representatives, self._strategy.draws, len(first))
            if self._config.fields is not None:
                refuse_left_behind(len(first), layout.lengths)
        self._fill(first.device)
        if self._coordinator.prefetcher is None:
            return layout
        buffer = self._coordinator.prefetcher.buffer
        loaded, wanted = (
            {field.name: (str(field.dtype), field.shape) for field in one.fields} for one in (buffer.layout, layout)
        )
        if loaded != wanted:
            longest = buffer.layout.longest
            same = f"set rehearsal.padding.length to {longest}, " if longest not in (None, layout.longest) else ""
            raise CheckpointError(
                f"the checkpoint holds rows of {loaded}, and the batch has {wanted}; {same}give batches of the same "
                f"fields, or {BEGIN_EMPTY}"
            )
        layout = replace(layout, fields=buffer.layout.fields)  # which may be in another order
        buffer.layout = replace(layout, state=buffer.layout.state, row_bytes=buffer.layout.row_bytes)
        return layout

    def _form_of(self, batch: FlatBatch) -> BatchForm:
        """How samples lie in the batches of a job, by the first one.

        Raises:
            ConfigError: The section needs another form.
        """
        config, padding = self._config, self.padding
        if config.rows_per_sample > 1:
            return GroupForm(SampleGroups(config.rows_per_sample, config.sample_layout), padding)
        if config.packing == "documents" and has_documents(batch):
            by_output = settings_by_output(config)
            if by_output:
                raise ConfigError(
                    f"{by_output[0]} needs outputs of the model for each sample, and this batch is one flat row of "
                    "documents; leave it out, set rehearsal.packing to 'rows', or give rows that are padded"
                )
            return DocumentForm(self._longest_document(batch))
        boundaries = boundaries_of(batch)
        if boundaries:
            raise BatchError(
                f"the batch tells by {boundaries} where its documents begin, which replayed rows would make wrong; "
                "leave rehearsal.packing at 'documents', or leave these fields out of the batch"
            )
        if config.ratio_in == "tokens" and padding is None:
            raise ConfigError("rehearsal.padding is missing: rehearsal.ratio_in 'tokens' counts what is no padding")
        return RowForm(padding)

    def _with_block_mask(self, form: BatchForm, batch: FlatBatch) -> BatchForm:
        """A form whose rows hold the index of a mask `[rows, 1, length, length]`, where the mask follows from it."""
        if self._config.packing == "rows" or self._config.inject == "loader":
            return form
        block = block_mask_of(batch)
        if block is None or (self._config.fields is not None and block.name not in self._config.fields):
            return form
        prefetcher = self._coordinator.prefetcher
        loaded = () if prefetcher is None else prefetcher.buffer.layout.fields
        if any(field.name == block.name and len(field.shape) > 1 for field in loaded):
            return form  # a checkpoint that holds whole masks
        return BlockMaskForm(form, block)

    def _longest_document(self, batch: FlatBatch) -> int:
        """Tokens of the longest document that is stored."""
        if self._config.padding is not None and self._config.padding.length is not None:
            return self._config.padding.length
        return self._loaded_length() or longest_for(int(lengths_of(batch).max()))

    def _loaded_length(self) -> int | None:
        """The longest row, in positions, of the checkpoint that was loaded; None without one."""
        prefetcher = self._coordinator.prefetcher
        return None if prefetcher is None else prefetcher.buffer.layout.longest

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
        batch, replayed = self._form.fit(batch, {name: replayed[name] for name in layout.names})
        if self._transform is not None and self._config.strategy.transform == "replayed":
            changed = flatten(self._transform(self._form.as_batch(layout, replayed).rebuild()))
            replayed = self._form.as_samples(changed, replayed)
        return self._form.join(layout, batch, replayed, displaced)

    def _count_towards_ratio(
        self, batch: FlatBatch, replayed: Mapping[str, Tensor], new: int, share: Share | None, turn: Turn
    ) -> None:
        """Count how much the model sees: `new` rows of the batch, and the replayed ones."""
        queue, rows = self._coordinator.queue, [new, 0 if share is None else share.count]
        amounts = rows
        if self._config.ratio_in == "tokens":
            amounts = [self._form.tokens(batch, new), self._form.replayed_tokens(replayed)]
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

    def _tokens(self, batch: FlatBatch) -> Tensor | None:
        """Tokens of each sample that count, `[samples]` int64; None where they are not counted."""
        counted = counted_tokens(batch)
        return None if counted is None else self._form.sums(batch, counted)


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
