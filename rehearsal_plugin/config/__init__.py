"""The `rehearsal` section: its keys, where it is found, and how it is refused when it cannot be used.

The section travels inside DeepSpeed's own config, which is printed as JSON and stored in checkpoints, so every
value is plain JSON. `python -m rehearsal_plugin.config` writes the section's JSON Schema.
"""

from __future__ import annotations

from importlib import import_module

from rehearsal_plugin.config.amounts import GuardConfig, RatioBudget, RatioSchedule
from rehearsal_plugin.config.buffer import BufferConfig
from rehearsal_plugin.config.models import ConfigSource, RehearsalConfig
from rehearsal_plugin.config.replay import PaddingConfig, SamplingConfig, StrategyConfig
from rehearsal_plugin.config.retrieval import RetrievalConfig
from rehearsal_plugin.config.running import CheckpointConfig, ExchangeConfig
from rehearsal_plugin.config.schema import json_schema
from rehearsal_plugin.config.source import find_block

__all__ = [
    "BufferConfig",
    "CheckpointConfig",
    "ConfigSource",
    "ExchangeConfig",
    "GuardConfig",
    "PaddingConfig",
    "RatioBudget",
    "RatioSchedule",
    "RehearsalConfig",
    "RetrievalConfig",
    "SamplingConfig",
    "StrategyConfig",
    "find_block",
    "json_schema",
]

# The wings that register the package's own policies, storages, strategies and transports. By name, and last: they
# import this package, and a section cannot be read without them.
for _wing in ("buffer.policies", "buffer.storage", "strategies", "distributed.transport"):
    import_module(f"rehearsal_plugin.{_wing}")
