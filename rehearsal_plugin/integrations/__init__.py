"""Training frameworks with a rehearsal buffer; each framework is imported when it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rehearsal_plugin.config import ConfigSource
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.handle import Handle

__all__ = ["Handle", "attach"]


def attach(target: Any, config: ConfigSource | None = None, *, model: nn.Module | None = None) -> Handle:
    """Attach a rehearsal buffer to a training job.

    Args:
        target: A DeepSpeed engine, or an optimizer made by `hvd.DistributedOptimizer`.
        config: The `rehearsal` section; None takes it from a DeepSpeed engine's own config.
        model: The model that a Horovod optimizer trains.

    Returns:
        The handle of the running rehearsal; it does nothing where the section is missing or disabled.

    Raises:
        ConfigError: The section cannot be used, or `target` is neither an engine nor such an optimizer.
        MissingDependencyError: `target` is an optimizer and Horovod is not installed.
    """
    if hasattr(target, "data_parallel_group") and hasattr(target, "global_steps"):
        from rehearsal_plugin.integrations.deepspeed import engine as deepspeed

        return deepspeed.attach(target, config)
    if isinstance(target, torch.optim.Optimizer):
        from rehearsal_plugin.integrations.horovod import optimizer as horovod

        if config is None:
            raise ConfigError("attach(optimizer) needs config=..., the rehearsal section or the path of its file")
        return horovod.attach(target, model, config)
    raise ConfigError(
        f"attach() takes a DeepSpeed engine or an optimizer made by hvd.DistributedOptimizer, not a "
        f"{type(target).__name__}; in any other loop, make a Rehearsal and call its update()"
    )
