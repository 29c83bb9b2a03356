"""The buffer as part of an elastic job's state.

    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, rehearsal=optimizer.rehearsal, batch=0)

Every rank keeps its own rows, so nothing is broadcast. A commit marks the state of the buffer on each rank, a restore
undoes later admissions, and a rank that joins later starts empty.
"""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.elastic.state import StateHandler, TorchState

from rehearsal_plugin.distributed.header import Progress
from rehearsal_plugin.distributed.transport.horovod import HorovodTransport, horovod_failures
from rehearsal_plugin.integrations.horovod.handle import HorovodHandle

__all__ = ["RehearsalStateHandler", "RehearsalTorchState"]


class RehearsalStateHandler(StateHandler):  # type: ignore[misc]  # Horovod has no types
    """Saves, restores and synchronises the rehearsal of a handle."""

    value: HorovodHandle

    def __init__(self, value: HorovodHandle) -> None:
        super().__init__(value)
        value.elastic = True
        self.save()

    def save(self) -> None:
        """Mark the state to come back to; Horovod calls it in `state.commit()`."""
        if self.value.rehearsal is not None:
            with horovod_failures():
                self.value.rehearsal.commit()

    def restore(self) -> None:
        """Return to the last commit; Horovod calls it when a collective failed."""
        if self.value.rehearsal is not None:
            self.value.rehearsal.rollback()

    def sync(self) -> None:
        """Agree on the step and restart the exchange; Horovod calls it when ranks came or went."""
        if self.value.rehearsal is not None:
            words = torch.zeros(len(Progress), dtype=torch.int64, device="cpu")
            words[Progress.STEP], words[Progress.TRANSPORTS_MADE] = self.value.rehearsal.steps, HorovodTransport.made
            furthest = hvd.allreduce(words, op=hvd.Max, name="rehearsal.progress").tolist()
            HorovodTransport.made = furthest[Progress.TRANSPORTS_MADE]
            self.value.rehearsal.restart(furthest[Progress.STEP], self.value.connect)


class RehearsalTorchState(TorchState):  # type: ignore[misc]  # Horovod has no types
    """A `TorchState` that includes the rehearsal of its optimizer, for scripts that do not name it."""

    def __init__(self, model: Any = None, optimizer: Any = None, **others: Any) -> None:
        handle = getattr(optimizer, "rehearsal", None)
        if isinstance(handle, HorovodHandle) and not any(other is handle for other in others.values()):
            others["rehearsal"] = handle
        super().__init__(model=model, optimizer=optimizer, **others)
