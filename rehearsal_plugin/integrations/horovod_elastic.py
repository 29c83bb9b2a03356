"""The buffer as part of an elastic job's state.

    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, rehearsal=optimizer.rehearsal, batch=0)

Every rank keeps rows of its own, so nothing is broadcast: a commit marks the buffer's state on each rank, a
restore undoes what was admitted since, and a rank that joins later starts empty.
"""

from __future__ import annotations

import horovod.torch as hvd
import torch
from horovod.torch.elastic.state import StateHandler

from rehearsal_plugin.integrations.horovod import HorovodHandle
from rehearsal_plugin.transport.horovod import horovod_failures

__all__ = ["RehearsalStateHandler"]


class RehearsalStateHandler(StateHandler):  # type: ignore[misc]  # Horovod has no types
    """Saves, restores and synchronises the rehearsal of a handle."""

    value: HorovodHandle

    def __init__(self, value: HorovodHandle) -> None:
        super().__init__(value)
        self.save()

    def save(self) -> None:
        """Commit; Horovod calls it in `state.commit()`."""
        if self.value.rehearsal is not None:
            with horovod_failures():
                self.value.rehearsal.commit()

    def restore(self) -> None:
        """Roll back to the last commit; Horovod calls it when a collective failed."""
        if self.value.rehearsal is not None:
            self.value.rehearsal.rollback()

    def sync(self) -> None:
        """Agree on the step and begin the exchange anew; Horovod calls it when ranks came or went."""
        if self.value.rehearsal is not None:
            steps = torch.tensor([self.value.rehearsal.steps])
            latest = int(hvd.allreduce(steps, op=hvd.Max, name="rehearsal.steps"))
            self.value.rehearsal.restart(latest, self.value.connect)
