"""The handle that `attach` returns, for any framework."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.inject.loader import RehearsalLoader
from rehearsal_plugin.integrations.peers import Peers
from rehearsal_plugin.integrations.ranks import gather_texts
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.strategies.base import Criterion

__all__ = ["JOINED_AT", "Handle", "check_fed"]

JOINED_AT = {"forward": "at the model's forward", "loader": "in the data loader"}
"""Where replayed rows join by `rehearsal.inject`, for a person; see `JobReport`."""


class Handle:
    """Handle returned by `attach()`; a no-op when rehearsal is disabled.

    Rehearsal is disabled without a `rehearsal` section, with `enabled: false`, and after `close`. A script needs no
    branch for it: all calls are allowed then, and batches and losses pass through unchanged.

    Args:
        rehearsal: The running `Rehearsal`; None if rehearsal is disabled.
        peers: Ranks of the job that see the same samples; None if there are none.
        model: The model that is trained, whose mode tells training from evaluation; None if it is unknown.

    Attributes:
        rehearsal: The running `Rehearsal`; None if rehearsal is disabled.
    """

    def __init__(self, rehearsal: Rehearsal | None, peers: Peers | None = None, model: nn.Module | None = None) -> None:
        self.rehearsal = rehearsal
        self._peers, self._model = peers, model
        if rehearsal is not None:
            rehearsal.report.joined_at = JOINED_AT[rehearsal.config.inject]

    @property
    def enabled(self) -> bool:
        """Whether rows are replayed: there is a rehearsal, and it is not closed."""
        return self.rehearsal is not None and not self.rehearsal.closed

    def metrics(self) -> dict[str, float]:
        """Totals on this rank by name, see `Rehearsal.metrics`; empty if rehearsal is disabled."""
        return {} if self.rehearsal is None else self.rehearsal.metrics()

    def loader(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Training batches with replayed rows, for loops that compute the loss outside the model.

        While the model is in evaluation mode, or gradients are disabled, batches pass through and are not stored.

        Args:
            batches: A `DataLoader` or any other iterable of batches.

        Returns:
            A `RehearsalLoader`, or `batches` itself if rehearsal is disabled.

        Raises:
            ConfigError: `rehearsal.inject` is not `"loader"`, so rows are injected at the model already.
        """
        if self.rehearsal is None or self.rehearsal.closed:
            return batches
        return RehearsalLoader(batches, self.rehearsal, active=self._is_training)

    def _is_training(self) -> bool:
        return torch.is_grad_enabled() and (self._model is None or self._model.training)

    def loss(self, criterion: Criterion, outputs: Any, *targets: Any) -> Tensor:
        """The strategy's loss, see `Rehearsal.loss`; `criterion(outputs, *targets)` if rehearsal is disabled.

        A model that computes its own loss needs no call: the strategy's term is added to that loss.
        """
        if self.rehearsal is None or self.rehearsal.closed:
            return criterion(outputs, *targets)
        return self.rehearsal.loss(criterion, outputs, *targets)

    def reweigh(self, weights: Mapping[Any, float]) -> None:
        """Change the weights of partitions while the job runs; see `Rehearsal.reweigh`."""
        if self.rehearsal is not None and not self.rehearsal.closed:
            self.rehearsal.reweigh(weights)

    def drop(self) -> None:
        """Drop the last micro-batch after a forward that failed; see `Rehearsal.drop`."""
        if self.rehearsal is not None:
            self.rehearsal.drop()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the buffer; see `Rehearsal.save`. Under DeepSpeed, `save_checkpoint` calls it."""
        if self._peers is not None:
            self._peers.save(Path(folder))
        elif self.rehearsal is not None and not self.rehearsal.closed:
            self.rehearsal.save(folder)

    def load(
        self,
        folder: str | os.PathLike[str],
        step: int | None = None,
        *,
        run: str | None = None,
        missing_ok: bool = False,
    ) -> bool:
        """Load a saved buffer; see `Rehearsal.load`. Under DeepSpeed, `load_checkpoint` calls it."""
        if self._peers is not None:
            return self._peers.load(Path(folder), step, run=run, missing_ok=missing_ok)
        if self.rehearsal is None or self.rehearsal.closed:
            return False
        return self.rehearsal.load(folder, step, run=run, missing_ok=missing_ok)

    def gather_texts(self, text: str) -> list[str]:
        """The text of every rank, by rank; this one's alone if rehearsal is disabled. All ranks make this call.

        Raises:
            ExchangeError: A rank does not answer.
        """
        if self._peers is not None:
            return gather_texts(text)
        if self.rehearsal is None or self.rehearsal.closed:
            return [text]
        return self.rehearsal.gather_texts(text)

    @property
    def progress(self) -> dict[str, Any]:
        """The `step` and `run` that `load` takes, to be kept beside the model; empty if there is nothing to load."""
        if self.rehearsal is None or self.rehearsal.closed:
            return {}
        return {"step": self.rehearsal.steps, "run": self.rehearsal.run}

    def check_peers(self) -> None:
        """After the first optimizer step, compare the rows of ranks that should see the same samples.

        Raises:
            BatchError: They saw different batches.
        """
        if self._peers is not None:
            self._peers.check_once()

    def close(self) -> None:
        """Stop the background thread and release the process group; a second call does nothing."""
        if self.rehearsal is not None:
            self.rehearsal.close()


def check_fed(rehearsal: Rehearsal, owner: str) -> None:
    """Raise at the first step of a job whose batches bypass the rehearsal: it would train without any replay.

    Args:
        rehearsal: The rehearsal that should have received batches.
        owner: Usual name of the variable with the attribute `rehearsal`, for the message.

    Raises:
        ConfigError: No batch has reached the rehearsal.
    """
    if rehearsal.fed:
        return
    if rehearsal.config.inject == "loader":
        raise ConfigError(
            "rehearsal.inject is 'loader' and no batch of the first step came out of a rehearsal loader; wrap the "
            f"training loader with {owner}.rehearsal.loader(...), or set rehearsal.inject to 'forward'"
        )
    raise ConfigError(
        "rehearsal.inject is 'forward' and the first step made no training pass through the model that was attached; "
        "call the engine (or the model given to attach) itself, in training mode, or set rehearsal.inject to 'loader'"
    )
