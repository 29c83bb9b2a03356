"""Injection at the loader: its batches contain replayed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.core.tree import FlatBatch, flatten
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.runtime.batch_augmenter import check_room

__all__ = ["RehearsalLoader"]


class RehearsalLoader:
    """Wraps any iterable of training batches.

    With `mode: append` every batch grows by its replayed rows. With `mode: replace` new rows are re-batched, so that
    every batch keeps its size and no row is skipped; an epoch then has more batches:

        batches of the wrapped loader        0 1 2 3 | 4 5 6 7 | 8 9 ...
        with one replayed row r in each      0 1 2 r | 3 4 5 r | 6 7 8 r | ...

    Leaves that are no fields of a row come from the batch that was read last. All other attributes are those of the
    wrapped loader, to read and to set. Once the rehearsal is closed, batches pass through unchanged.

    Args:
        batches: A `DataLoader`, or any iterable that starts anew with each `iter`.
        rehearsal: Source of the rows; its `step` is called once an optimizer step, as `attach` does.
        active: Called for every batch; while it returns False, batches pass through unchanged.

    Raises:
        ConfigError: `rehearsal.inject` is not `"loader"`.
    """

    def __init__(self, batches: Iterable[Any], rehearsal: Rehearsal, active: Callable[[], bool] = lambda: True) -> None:
        if rehearsal.config.inject != "loader":
            raise ConfigError(
                "rehearsal.inject is 'forward', so replayed rows are injected at the model already; "
                "set it to 'loader' to have them in the batches"
            )
        self._batches, self._rehearsal, self._active = batches, rehearsal, active

    def __iter__(self) -> Iterator[Any]:
        if self._rehearsal.config.mode == "append":
            return map(self._augment_batch, self._batches)
        return self._rebatch()

    def __len__(self) -> int:
        if self._rehearsal.config.mode == "replace":
            raise TypeError("the number of batches is not known beforehand with rehearsal.mode 'replace'")
        if not isinstance(self._batches, Sized):
            raise TypeError(f"a {type(self._batches).__name__} has no length; wrap a DataLoader to have one")
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_batches" not in self.__dict__:  # copying and pickling look before __init__
            raise AttributeError(name)
        return getattr(self._batches, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # DeepSpeed sets attributes of the loader that it finds in its engine.
        if name in {"_batches", "_rehearsal", "_active"}:
            super().__setattr__(name, value)
        else:
            setattr(self._batches, name, value)

    def _augment_batch(self, batch: Any) -> Any:
        return self._rehearsal.augment(batch, displace=False) if self._is_active else self._rehearsal.visible(batch)

    @property
    def _is_active(self) -> bool:
        return not self._rehearsal.closed and self._active()

    def _rebatch(self) -> Iterator[Any]:
        """Batches of new rows that leave room for replayed ones; `rest` holds the `carried` rows for the next batch."""
        layout: RowLayout | None = None
        rest: FlatBatch | None = None
        size, carried, padding = 0, 0, self._rehearsal.padding
        for batch in self._batches:
            if not self._is_active:
                if rest is not None and carried:
                    yield self._rehearsal.visible(rest)
                carried, rest = 0, None
                yield self._rehearsal.visible(batch)
                continue
            flat = flatten(batch) if padding is None else padding.widen(batch)
            if layout is None:
                layout = RowLayout.infer(flat, self._rehearsal.config.fields)
            size = size or layout.size(flat)  # of the first batch that has rows
            rest = flat if rest is None else layout.concatenate(rest, flat)
            carried = layout.size(rest)
            while carried >= (room := self._room_for_new(size)) and carried:
                ready = layout.cut(rest, 0, room)
                yield self._augment_batch(ready if padding is None else padding.narrow(ready))
                rest = layout.cut(rest, room, None)
                carried -= room
        if rest is not None and carried:
            yield self._augment_batch(rest if padding is None else padding.narrow(rest))

    def _room_for_new(self, size: int) -> int:
        check_room(self._rehearsal.config.representatives, self._rehearsal.strategy.draws, size)
        return max(0, size - self._rehearsal.due(size)) if self._is_active else size
