"""What becomes of a batch: its candidates go to the buffer, and replayed rows come to the model with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rehearsal_plugin.buffer.rows.allocator import RecycledMemory
from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.buffer.rows.padding import Padding
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.core.arrays import IntArray
from rehearsal_plugin.core.tree import leaves_of, without
from rehearsal_plugin.errors import CheckpointError, ConfigError
from rehearsal_plugin.runtime.coordinator import ReplayCoordinator
from rehearsal_plugin.runtime.micro_batch import MicroBatch
from rehearsal_plugin.runtime.pending_losses import PendingLosses
from rehearsal_plugin.runtime.representatives import Share
from rehearsal_plugin.runtime.token_losses import token_counts
from rehearsal_plugin.strategies import Strategy

__all__ = ["BatchAugmenter", "Transform"]

Transform: TypeAlias = Callable[[Any], Any]


class BatchAugmenter:
    """Stages candidates and joins replayed rows to batches.

    Args:
        config: The `rehearsal` section.
        strategy: What replayed rows are used for.
        coordinator: Where rows go to and come from.
        answers: Waits for what the model makes of a micro-batch.
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
        answers: PendingLosses,
        *,
        transform: Transform | None,
        fill: Callable[[torch.device], None],
    ) -> None:
        self._config, self._strategy, self._coordinator, self._answers = config, strategy, coordinator, answers
        self._transform, self._fill = transform or _unchanged, fill
        self.padding = None if config.padding is None else Padding(config.padding)
        self._layout: RowLayout | None = None
        self._memory = RecycledMemory()

    @property
    def fed(self) -> bool:
        """Whether a batch has come yet."""
        return self._layout is not None

    def begin(self) -> None:
        """The next batch is the first one again."""
        self._layout = None

    def augment(self, batch: Any, *, displace: bool) -> Any:
        """See `Rehearsal.augment`."""
        stored = batch if self.padding is None else self.padding.widen(batch)
        layout = self._layout = self._layout or self._first_layout(stored)
        columns = layout.columns(stored)
        size, replacing = len(columns[0]), self._config.mode == "replace"
        if not self._strategy.records:
            self._coordinator.stage(columns, layout, {})  # first: rows that it refuses must leave no trace
        share = self._coordinator.take(size if replacing and displace else None)
        displaced = len(share.rows) if share is not None and replacing and displace else 0
        new = size - displaced
        self._weigh(batch, new, share)
        # Only what the model sees has outputs, and it has them later; whoever gave the batch may change it until then.
        own = [column[:new].clone() for column in columns] if self._strategy.records else []
        keys = self._keys(layout, columns, new, share)
        seen = self._joined(layout, batch, share, displaced)
        self._answers.expect(MicroBatch(own, new, share, self._strategy.draws, keys, _labels(seen)), layout)
        self._count(seen, new, displaced, share, keys)
        return self.visible(seen)

    def visible(self, batch: Any) -> Any:
        """See `Rehearsal.visible`."""
        return without(batch, self._config.hidden) if self._config.hidden else batch

    def _first_layout(self, batch: Any) -> RowLayout:
        """The layout of the first batch; that of rows from a checkpoint gets its nesting."""
        layout = RowLayout.infer(batch, self._config.fields)
        first = layout.columns(batch)[0]
        if self._config.mode == "replace":
            check_room(self._config.representatives, self._strategy.draws, len(first))
        self._fill(first.device)
        if self._coordinator.prefetcher is None:
            return layout
        buffer = self._coordinator.prefetcher.buffer
        stored = buffer.layout
        loaded, given = (
            {field.name: (str(field.dtype), field.shape) for field in one.fields} for one in (stored, layout)
        )
        if loaded != given:
            raise CheckpointError(
                f"the checkpoint holds rows of {loaded}, and the batch has {given}; give batches of the same fields, "
                "or start with an empty buffer"
            )
        layout = replace(layout, fields=stored.fields)  # which may be in another order
        buffer.layout = replace(layout, state=stored.state, row_bytes=stored.row_bytes)
        return layout

    def _joined(self, layout: RowLayout, batch: Any, share: Share | None, displaced: int) -> Any:
        """The batch with replayed rows behind it, transformed as the strategy says."""
        everything = self._config.strategy.transform == "all"
        if share is not None and len(share.rows):
            replayed = layout.unpack(share.rows)
            if self.padding is not None:
                batch, replayed = self.padding.alike(batch, replayed)
            batch = layout.join(batch, replayed if everything else self._transform(replayed), self._memory, displaced)
        return self._transform(batch) if everything else batch

    def _weigh(self, batch: Any, new: int, share: Share | None) -> None:
        """Tell the schedule how much the model sees: `new` rows of the batch, and the replayed ones."""
        rows = [new, 0 if share is None else len(share.rows)]
        amounts = rows
        if self._config.ratio_in == "tokens" and self.padding is not None and self._layout is not None:
            replayed = None if share is None else self._layout.unpack(share.rows)
            lengths = (self.padding.lengths(batch)[:new], None if replayed is None else self.padding.lengths(replayed))
            amounts = [0 if part is None else int(part.sum()) for part in lengths]
            for count, amount, again in zip(rows, amounts, (False, True), strict=True):
                self._coordinator.schedule.saw(count, amount, replayed=again)
        self._coordinator.seen(sum(amounts) if self._config.mode == "replace" else amounts[0])

    def _keys(self, layout: RowLayout, columns: list[Tensor], new: int, share: Share | None) -> IntArray | None:
        """The partition keys of all rows that the model sees, `[rows]` int64; None without partitions."""
        name = self._config.buffer.partition_by
        if name is None:
            return None
        place = [field.name for field in layout.fields].index(layout.field(name).name)
        parts = [columns[place][:new]]
        if share is not None:
            parts.append(layout.fields[place].view(share.rows).to(parts[0].device))
        keys: IntArray = torch.cat([part.reshape(-1).to(torch.int64) for part in parts]).cpu().numpy()
        return keys

    def _count(self, seen: Any, new: int, displaced: int, share: Share | None, keys: IntArray | None) -> None:
        metrics = self._coordinator.metrics
        tokens = token_counts(seen)
        if tokens is not None:
            metrics.count_tokens(tokens, new, keys)
        if share is None:
            return
        metrics.rows_replayed += len(share.rows)
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


def _labels(batch: Any) -> Tensor | None:
    """The labels of a batch, by the name that models of Hugging Face have for them."""
    found = leaves_of(batch).get("labels")
    return found if isinstance(found, Tensor) else None


def _unchanged(batch: Any) -> Any:
    return batch
