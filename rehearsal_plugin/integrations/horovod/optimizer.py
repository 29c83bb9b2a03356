"""Horovod: rows are injected at the model or at the loader, and the optimizer's step ends the step.

The exchange is issued from the training thread, once a step, between the averaging of the gradients and the update. It
then has the update and the next two passes to finish. `DistributedOptimizer.step` runs the step hooks twice, nested:

    pre hook                  depth 1
        synchronize           gradients are averaged
        pre hook              depth 2: `HorovodHandle.step`
            update
        post hook
    post hook

A single pair of hooks is no step: Horovod runs one to set up the state of an optimizer that it broadcasts.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn

from rehearsal_plugin.config import ConfigSource, RehearsalConfig
from rehearsal_plugin.distributed.transport.horovod import announcing_horovod_failure, import_horovod
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.handle import JOINED_AT, Handle
from rehearsal_plugin.integrations.horovod.handle import HorovodHandle
from rehearsal_plugin.integrations.horovod.join import refuse_join
from rehearsal_plugin.integrations.inject.forward import ForwardInjection
from rehearsal_plugin.integrations.inject.wrap_dataloaders import wrap_data_loaders
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.strategies import make_strategy

__all__ = ["attach", "patch"]


def attach(optimizer: Any, model: nn.Module | None, config: ConfigSource) -> HorovodHandle:
    """Give a job with `hvd.DistributedOptimizer` a rehearsal buffer.

    Ranks of the optimizer's process set share one distributed buffer. All of them must call this.

    Args:
        optimizer: The `DistributedOptimizer`.
        model: The model whose training passes get replayed rows; not needed with `inject: loader`.
        config: The `rehearsal` section.

    Returns:
        The handle, also found at `optimizer.rehearsal`; give it to `hvd.elastic.TorchState` in an elastic job.

    Raises:
        MissingDependencyError: Horovod is not installed.
        ConfigError: The section cannot be used, the model is missing, or the optimizer is not supported.
        ExchangeError: `hvd.init()` was not called, or this rank is not in the optimizer's process set.
    """
    hvd = import_horovod()
    with announcing_horovod_failure(getattr(optimizer, "process_set", hvd.global_process_set)):
        section = RehearsalConfig.load(config)
        section.look_up_names()
        make_strategy(section.strategy)  # refuses what it cannot use
        _check_optimizer(optimizer, model, section, hvd.Adasum)
    _register_elastic()
    if section.enabled and section.inject == "loader" and model is None:
        with suppress(ConfigError):  # then a loader cannot tell training from evaluation
            model = _model_of(optimizer)
    optimizer.rehearsal = handle = HorovodHandle(optimizer.process_set, model)
    if section.enabled:
        handle.rehearsal = rehearsal = Rehearsal(section, handle.connect())
        rehearsal.report.joined_at = JOINED_AT[section.inject]
        handle.follow_steps(optimizer)
        refuse_join(import_horovod(), handle)
        if section.inject == "forward" and model is not None:
            ForwardInjection(rehearsal, model).register()
    return handle


def _check_optimizer(optimizer: Any, model: nn.Module | None, section: RehearsalConfig, adasum: object) -> None:
    if getattr(optimizer, "op", adasum) == adasum or not hasattr(optimizer, "skip_synchronize"):
        raise ConfigError(
            "rehearsal needs an optimizer made by hvd.DistributedOptimizer with op=hvd.Average or op=hvd.Sum; "
            "op=hvd.Adasum steps inside backward, so there is no step to follow"
        )
    if isinstance(getattr(optimizer, "rehearsal", None), Handle) and optimizer.rehearsal.enabled:
        raise ConfigError(
            "this optimizer has a rehearsal already; call attach(optimizer) once, or optimizer.rehearsal.close() first"
        )
    if section.enabled and section.inject == "forward" and model is None:
        raise ConfigError(
            "attach(optimizer) needs model=... to inject rows at its forward, or rehearsal.inject: loader"
        )


def patch(config: ConfigSource) -> None:
    """Make `hvd.DistributedOptimizer` attach by itself, for the whole process, so that a script needs no change.

    `hvd.elastic.TorchState` then includes the rehearsal of its optimizer. With `inject: loader`, every `DataLoader`
    gives replayed rows while the model is in training mode and gradients are enabled.

    Args:
        config: The `rehearsal` section.

    Raises:
        MissingDependencyError: Horovod is not installed.
        ConfigError: The section cannot be used.
    """
    hvd = import_horovod()
    original: Callable[..., Any] = hvd.DistributedOptimizer
    section = RehearsalConfig.load(config)

    @functools.wraps(original)
    def make_and_attach(*args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        model = _model_of(optimizer) if section.enabled else None
        rehearsal = attach(optimizer, model, section).rehearsal
        if rehearsal is not None and model is not None and section.inject == "loader":
            wrap_data_loaders(rehearsal, model)
        return optimizer

    hvd.DistributedOptimizer = make_and_attach
    _patch_elastic(hvd)


def _patch_elastic(hvd: Any) -> None:
    from rehearsal_plugin.integrations.horovod.elastic import RehearsalTorchState

    hvd.elastic.TorchState = RehearsalTorchState


def _model_of(optimizer: Any) -> nn.Module:
    """The model of an optimizer: the outermost module that holds all its parameters."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    modules: list[nn.Module] = [item for item in gc.get_objects() if issubclass(type(item), nn.Module)]
    owners = [module for module in modules if trained <= {id(p) for p in module.parameters()}]
    nested = {id(child) for module in owners for child in module.modules() if child is not module}
    outermost = [module for module in owners if id(module) not in nested]
    if len(outermost) != 1:
        raise ConfigError(
            f"{len(outermost)} models hold all parameters of this optimizer, so it is not clear which one to augment; "
            "call rehearsal_plugin.attach(optimizer, model=model, config=...) in the script"
        )
    return outermost[0]


def _register_elastic() -> None:
    """Register how `hvd.elastic.TorchState` treats a handle; as a plain object, rank 0's would replace all others."""
    from horovod.torch.elastic import state

    from rehearsal_plugin.integrations.horovod.elastic import RehearsalStateHandler

    registry = state.get_handler_registry()
    if not any(kind is HorovodHandle for kind, _ in registry):
        state.set_handler_registry([(HorovodHandle, RehearsalStateHandler), *registry])
