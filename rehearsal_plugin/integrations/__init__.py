"""Where the buffer meets a training framework. Each framework is imported only when it is used."""

from __future__ import annotations

from typing import Any

from rehearsal_plugin.config import ConfigSource
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.handle import Handle

__all__ = ["Handle", "attach"]


def attach(target: Any, config: ConfigSource | None = None) -> Handle:
    """Attach a rehearsal buffer to a training job.

    Args:
        target: A DeepSpeed engine.
        config: The `rehearsal` section; None takes it from the engine's own config.

    Returns:
        A handle to metrics, loader and `close`.

    Raises:
        ConfigError: The section cannot be used, or `target` is nothing that rows can be attached to.
    """
    if hasattr(target, "data_parallel_group") and hasattr(target, "global_steps"):
        from rehearsal_plugin.integrations import deepspeed

        return deepspeed.attach(target, config)
    raise ConfigError(
        f"attach() takes a DeepSpeed engine and was given {type(target).__name__}; "
        "in any other loop, make a Rehearsal and call its update()"
    )
