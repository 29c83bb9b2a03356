"""Training in a study: a network on all ranks, its optimizer, and rehearsal where the method replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rehearsal_plugin import Rehearsal
from scripts.studies.arms import DERPP, REPLAYING, Arm
from scripts.studies.knobs import Knobs

__all__ = ["Batch", "Learner", "rehearsal_section"]

Batch: TypeAlias = dict[str, Tensor]


class Learner:
    """A network on all ranks with its optimizer, and rehearsal where the method has it.

    Args:
        network: Its output and the targets go into `loss`.
        optimizer: Makes the optimizer of the parameters.
        loss: `loss(output, *targets)`, a scalar; for a strategy also without reduction.
        fields: Of a batch: the input of the network, then the targets.
        section: The `rehearsal` section; None without rehearsal.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        loss: Callable[..., Tensor],
        fields: Sequence[str],
        section: dict[str, Any] | None,
    ) -> None:
        # Channels last is the fast memory format on CPUs.
        self.model = DistributedDataParallel(network.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self.optimizer = optimizer(self.model.parameters())
        self._loss, self._fields = loss, fields
        self.rehearsal = None if section is None else Rehearsal(section)

    def step(self, batch: Batch) -> None:
        """One optimizer step on this rank's new rows, and on replayed ones behind them."""
        if self.rehearsal is not None:
            batch = self.rehearsal.augment(batch)
        inputs, *targets = (batch[name] for name in self._fields)
        output = self.model(inputs)
        if self.rehearsal is None:
            loss = self._loss(output, *targets)
        else:
            loss = self.rehearsal.loss(self._loss, output, *targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.rehearsal is not None:
            self.rehearsal.step()

    def buffer_mib(self) -> float:
        """Memory of the rows that all ranks store; a collective."""
        buffer = None if self.rehearsal is None else self.rehearsal.buffer
        stored = 0 if buffer is None else len(buffer) * buffer.layout.row_bytes
        size = torch.tensor(stored / 2**20, dtype=torch.float64)
        dist.all_reduce(size)
        return size.item()

    def close(self) -> None:
        """End the background work."""
        if self.rehearsal is not None:
            self.rehearsal.close()


def rehearsal_section(arm: Arm, knobs: Knobs, capacity: int) -> dict[str, Any] | None:
    """The `rehearsal` section of an arm; None where its method does not replay.

    `der++` draws twice, so each of its draws brings half of the rows.
    """
    if arm.method not in REPLAYING:
        return None
    return {
        "buffer": {"capacity": capacity},
        "representatives": arm.representatives // (2 if arm.method == DERPP else 1),
        "candidates": arm.candidates,
        "strategy": {"name": arm.method, "loss_weight": knobs.loss_weight, "alpha": knobs.alpha, "beta": knobs.beta},
        "seed": arm.seed,
    }
