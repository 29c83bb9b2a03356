"""Batches of several rows an example, as of preference pairs, are refused unless the section says how they go together.

How many examples a batch was made of, only its collator knows: a first batch may have fewer than
`per_device_train_batch_size`, and ranks may split one. So the collator of the training loader is asked, in the process
that runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.utils.data import DataLoader

from rehearsal_plugin.buffer.rows.layout import RowLayout
from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import BatchError

__all__ = ["CheckedCollator", "check_rows", "watch_collator"]


class CheckedCollator:
    """Collator that checks its first batch by `check_rows`; otherwise it is the one that it wraps.

    Args:
        collator: Makes a batch of a list of examples.
        config: The `rehearsal` section.
    """

    def __init__(self, collator: Callable[[Any], Any], config: RehearsalConfig) -> None:
        self.collator, self._config, self._checked = collator, config, False

    def __call__(self, examples: Any) -> Any:
        """The batch of a list of examples.

        Raises:
            BatchError: See `check_rows`.
        """
        batch = self.collator(examples)
        if not self._checked:
            self._checked = True
            if isinstance(examples, (list, tuple)):
                check_rows(batch, len(examples), self._config)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "collator" not in self.__dict__:  # copying and pickling look before __init__
            raise AttributeError(name)
        return getattr(self.collator, name)


def watch_collator(loader: Any, config: RehearsalConfig) -> bool:
    """Have the collator of a training loader checked at its first batch, in each process that runs it.

    Args:
        loader: Loader of a trainer, as Accelerate prepared it.
        config: The `rehearsal` section.

    Returns:
        Whether the loader has a collator that is asked.
    """
    inner = getattr(loader, "base_dataloader", loader)
    if not isinstance(inner, DataLoader):
        return False
    if not isinstance(inner.collate_fn, CheckedCollator):
        inner.collate_fn = CheckedCollator(inner.collate_fn, config)
    return True


def check_rows(batch: Any, examples: int, config: RehearsalConfig) -> None:
    """Refuse a batch that has more rows than examples.

    Raises:
        BatchError: It has, and the section does not set `rows_per_sample`.
    """
    if "rows_per_sample" in config.model_fields_set:
        return
    rows = 0
    with suppress(BatchError):  # a batch without rows is refused where they would be stored
        rows = RowLayout.infer(batch, config.fields).size(batch)
    if rows > examples:
        together = -(-rows // examples)  # where the number of examples is a guess, there may be fewer
        raise BatchError(
            f"the batch has {rows} rows of {examples} examples, so {together} rows may belong together, as the pairs "
            f"of preference training do; set rehearsal.rows_per_sample to {together} (with rehearsal.sample_layout), "
            "or to 1 if every row stands alone"
        )
