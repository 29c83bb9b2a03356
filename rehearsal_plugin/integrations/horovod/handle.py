"""The handle of a Horovod optimizer: it steps with the optimizer and follows changes of the ranks."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from rehearsal_plugin.distributed.transport.horovod import HorovodTransport, horovod_failures
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.handle import Handle, check_fed

__all__ = ["HorovodHandle"]


class HorovodHandle(Handle):
    """Steps with the optimizer, and reconnects when an elastic job has changed its ranks.

    Args:
        process_set: Ranks that share the buffer.
        model: See `Handle`.

    Attributes:
        elastic: Whether the handle is part of an elastic job's state.
    """

    def __init__(self, process_set: Any, model: nn.Module | None = None) -> None:
        super().__init__(None, model=model)
        self._process_set = process_set
        self._transport: HorovodTransport | None = None
        self._depth = 0  # of nested step hooks, see `optimizer`
        self.elastic = False

    def connect(self) -> HorovodTransport:
        """Make a transport between the present ranks."""
        self._depth = 0
        self._transport = HorovodTransport(self._process_set)
        return self._transport

    def follow_steps(self, optimizer: Any) -> None:
        """Step once for every step of a `DistributedOptimizer`."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._reset_depth)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def load(
        self,
        folder: str | os.PathLike[str],
        step: int | None = None,
        *,
        run: str | None = None,
        missing_ok: bool = False,
    ) -> bool:
        """See `Handle.load`; an elastic job commits at once, so that it restores the loaded rows."""
        loaded = super().load(folder, step, run=run, missing_ok=missing_ok)
        if loaded and self.elastic and self.rehearsal is not None:
            self.rehearsal.commit()
        return loaded

    def step(self) -> None:
        """End an optimizer step.

        Raises:
            ConfigError: No batch of the first step came through the rehearsal.
            ExchangeError: The exchange failed; it is a `HorovodInternalError` too where Horovod failed.
        """
        if self.rehearsal is None or self.rehearsal.closed:
            return
        if self._transport is not None and self._transport.outdated:
            # A job that only loses hosts goes on without a `sync`: the remaining ranks are at the same step.
            self.rehearsal.restart(self.rehearsal.steps, self.connect)
        check_fed(self.rehearsal, "optimizer")
        with horovod_failures():
            self.rehearsal.step()

    def _reset_depth(self, _: torch.Tensor) -> None:
        self._depth = 0  # after an error inside the last step it may not be 0

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_closure([*args, *kwargs.values()])
        self._depth += 1
        if self._depth == 2:
            self.step()

    def _after_step(self, *_: Any) -> None:
        self._depth -= 1

    def _check_closure(self, arguments: list[Any]) -> None:
        """Refuse a closure that calls the model: its passes would belong to the step after the one that it is for.

        Raises:
            ConfigError: `step` has a closure, and rows are injected at the model.
        """
        given = any(callable(argument) and not isinstance(argument, torch.optim.Optimizer) for argument in arguments)
        if given and self.enabled and self.rehearsal is not None and self.rehearsal.config.inject == "forward":
            raise ConfigError(
                "optimizer.step(closure) calls the model within the step, when its gradients were averaged and its "
                "rows were exchanged already, and rehearsal.inject is 'forward'; call the model before step(), or set "
                "rehearsal.inject to 'loader'"
            )
