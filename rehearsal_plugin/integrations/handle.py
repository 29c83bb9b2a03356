"""What `attach` gives back, whichever framework it attached to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.inject.loader import RehearsalLoader
from rehearsal_plugin.integrations.peers import Peers
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.strategies.base import Criterion

__all__ = ["Handle", "check_fed"]


class Handle:
    """A rehearsal that is attached to a training job, or the lack of one.

    Without a `rehearsal` section, or with `enabled: false`, every call is harmless and does nothing, so a
    script needs no case of its own for it. After `close` the training goes on as if there were none.

    Args:
        rehearsal: As below.
        peers: The ranks that see the same samples; None if there are none.

    Attributes:
        rehearsal: The running `Rehearsal`; None if there is none.
    """

    def __init__(self, rehearsal: Rehearsal | None, peers: Peers | None = None) -> None:
        self.rehearsal = rehearsal
        self._peers = peers

    @property
    def enabled(self) -> bool:
        """Whether rows are rehearsed: there is a rehearsal, and it was not closed."""
        return self.rehearsal is not None and not self.rehearsal.closed

    def metrics(self) -> dict[str, float]:
        """Totals on this rank by name, as `Rehearsal.metrics`; empty if there is no rehearsal."""
        return {} if self.rehearsal is None else self.rehearsal.metrics()

    def loader(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Training batches with replayed rows, for loops that compute the loss outside the model.

        Args:
            batches: A `DataLoader` or any other iterable of batches.

        Returns:
            A `RehearsalLoader`, or `batches` itself if there is no rehearsal (any more).

        Raises:
            ConfigError: `rehearsal.inject` is not `"loader"`, so rows are injected at the model already.
        """
        if self.rehearsal is None or self.rehearsal.closed:
            return batches
        return RehearsalLoader(batches, self.rehearsal)

    def loss(self, criterion: Criterion, outputs: Any, *targets: Any) -> Tensor:
        """The strategy's loss, as `Rehearsal.loss`; `criterion(outputs, *targets)` if there is no rehearsal.

        Models that compute their loss themselves need no call: the strategy's term is added to it on the way.
        """
        if self.rehearsal is None or self.rehearsal.closed:
            return criterion(outputs, *targets)
        return self.rehearsal.loss(criterion, outputs, *targets)

    def reweigh(self, weights: Mapping[Any, float]) -> None:
        """Change the mixture while the job runs, as `Rehearsal.reweigh`."""
        if self.rehearsal is not None and not self.rehearsal.closed:
            self.rehearsal.reweigh(weights)

    def drop(self) -> None:
        """Forget the last micro-batch, as `Rehearsal.drop`, after a forward that failed."""
        if self.rehearsal is not None:
            self.rehearsal.drop()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the buffer, as `Rehearsal.save`. Under DeepSpeed, `save_checkpoint` does it."""
        if self._peers is not None:
            self._peers.save(Path(folder))
        elif self.rehearsal is not None and not self.rehearsal.closed:
            self.rehearsal.save(folder)

    def load(self, folder: str | os.PathLike[str], step: int | None = None, *, missing_ok: bool = False) -> bool:
        """Go on from a saved buffer, as `Rehearsal.load`. Under DeepSpeed, `load_checkpoint` does it."""
        if self._peers is not None:
            return self._peers.load(Path(folder), step, missing_ok=missing_ok)
        if self.rehearsal is None or self.rehearsal.closed:
            return False
        return self.rehearsal.load(folder, step, missing_ok=missing_ok)

    def check_peers(self) -> None:
        """After the first optimizer step: ranks that are to see the same samples compare what they were given.

        Raises:
            BatchError: They were given different batches.
        """
        if self._peers is not None:
            self._peers.check_once()

    def close(self) -> None:
        """Stop the background and give up the process group; a second call does nothing."""
        if self.rehearsal is not None:
            self.rehearsal.close()


def check_fed(rehearsal: Rehearsal, owner: str) -> None:
    """Refuse the first step of a job whose batches take another way: it would train on without any replay.

    Args:
        rehearsal: What should have been fed.
        owner: The variable that holds the handle in a usual script, for the message.

    Raises:
        ConfigError: No batch has come.
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
