"""Horovod: the clock is the allreduce of the gradients, rows are injected at the model or at the loader.

The exchange is issued from the training thread, once a step, right behind the allreduces of the gradients and
before they are waited for. `DistributedOptimizer.step` runs its step hooks twice, around `synchronize` and around
the update; and a script may call `synchronize` itself. A step is therefore known by its gradients: the first step
hook after a gradient has been accumulated is the one.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rehearsal_plugin.config import ConfigSource, RehearsalConfig
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.data_loaders import wrap_data_loaders
from rehearsal_plugin.integrations.forward import ForwardInjection
from rehearsal_plugin.integrations.handle import Handle
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.transport.horovod import HorovodTransport, horovod_failures

__all__ = ["attach", "patch"]


def attach(optimizer: Any, model: nn.Module | None, config: ConfigSource, process_set: Any = None) -> HorovodHandle:
    """Give a job with `hvd.DistributedOptimizer` a rehearsal buffer.

    Args:
        optimizer: The `DistributedOptimizer`.
        model: The model whose training passes get replayed rows; not needed with `inject: loader`.
        config: The `rehearsal` section.
        process_set: The ranks that share the buffer; None for all.

    Returns:
        The handle, also found at `optimizer.rehearsal`; give it to `hvd.elastic.TorchState` in an elastic job.

    Raises:
        ConfigError: The section cannot be used, the model is missing, or the optimizer cannot be hooked.
    """
    section = RehearsalConfig.load(config)
    connect = functools.partial(HorovodTransport, process_set)
    _register_elastic()
    if not section.enabled:
        return HorovodHandle(None, connect)
    if hasattr(optimizer, "rehearsal"):
        raise ConfigError("this optimizer has a rehearsal already; call attach(optimizer) once")
    if section.inject == "forward" and model is None:
        raise ConfigError(
            "attach(optimizer) needs model=... to inject rows at its forward, or rehearsal.inject: loader"
        )
    rehearsal = Rehearsal(section, connect())
    Clock(rehearsal, optimizer)
    if section.inject == "forward" and model is not None:
        injection = ForwardInjection(rehearsal, model)
        model.register_forward_pre_hook(lambda _, args, kwargs: injection(args, kwargs), with_kwargs=True, prepend=True)
    optimizer.rehearsal = handle = HorovodHandle(rehearsal, connect)
    return handle


class HorovodHandle(Handle):
    """A handle that knows how to connect again, for elastic jobs."""

    def __init__(self, rehearsal: Rehearsal | None, connect: Callable[[], HorovodTransport]) -> None:
        super().__init__(rehearsal)
        self.connect = connect


class Clock:
    """Steps a rehearsal once for every step of an optimizer.

    Args:
        rehearsal: What to step.
        optimizer: A `DistributedOptimizer` that averages gradients.

    Raises:
        ConfigError: The optimizer is of the Adasum kind, which updates parameter by parameter.
    """

    def __init__(self, rehearsal: Rehearsal, optimizer: Any) -> None:
        if not hasattr(optimizer, "skip_synchronize") or "Adasum" in type(optimizer).__mro__[1].__name__:
            raise ConfigError("rehearsal needs an optimizer made by hvd.DistributedOptimizer with op Average or Sum")
        self._rehearsal = rehearsal
        self._gradients = False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._accumulated)
        optimizer.register_step_pre_hook(self._stepping)

    def _accumulated(self, _: torch.Tensor) -> None:
        self._gradients = True

    def _stepping(self, *_: Any) -> None:
        if self._gradients and not self._rehearsal.closed:
            self._gradients = False
            with horovod_failures():
                self._rehearsal.step()


def patch(config: ConfigSource) -> None:
    """Make `hvd.DistributedOptimizer` attach by itself, for scripts that are to be left untouched.

    With `inject: loader`, every `DataLoader` gives replayed rows while the model is in training mode and
    gradients are enabled.
    """
    import horovod.torch as hvd

    original = hvd.DistributedOptimizer
    section = RehearsalConfig.load(config)

    @functools.wraps(original)
    def attached(*args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        model = _owner(optimizer)
        rehearsal = attach(optimizer, model, section).rehearsal
        if rehearsal is not None and section.inject == "loader":
            wrap_data_loaders(rehearsal, model)
        return optimizer

    hvd.DistributedOptimizer = attached


def _owner(optimizer: Any) -> nn.Module:
    """The model that an optimizer trains: the outermost module that holds its parameters."""
    wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
    modules = [item for item in gc.get_objects() if isinstance(item, nn.Module)]
    owners = [module for module in modules if wanted <= {id(p) for p in module.parameters()}]
    inner = {id(child) for module in owners for child in module.modules() if child is not module}
    outermost = [module for module in owners if id(module) not in inner]
    if len(outermost) != 1:
        raise ConfigError(
            f"{len(outermost)} models hold all parameters of this optimizer, so it is not clear which one to augment; "
            "call rehearsal_plugin.attach(optimizer, model=model, config=...) in the script"
        )
    return outermost[0]


def _register_elastic() -> None:
    """Let `hvd.elastic.TorchState` take a handle; as a plain object, rank 0's would replace all others."""
    from horovod.torch.elastic import state

    from rehearsal_plugin.integrations.horovod_elastic import RehearsalStateHandler

    registry = state.get_handler_registry()
    if not any(kind is HorovodHandle for kind, _ in registry):
        state.set_handler_registry([(HorovodHandle, RehearsalStateHandler), *registry])
