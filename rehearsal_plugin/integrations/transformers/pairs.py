"""Collators of preference training, whose rows belong together: chosen ones first, rejected ones behind."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from torch.torch_version import TorchVersion

from rehearsal_plugin.config import RehearsalConfig

__all__ = ["with_pairs"]

COLLATORS = {
    "trl.trainer.dpo_trainer.DataCollatorForPreference": "0.29.0",
    "trl.trainer.dpo_trainer.DataCollatorForVisionPreference": "0",
    "trl.trainer.reward_trainer.DataCollatorForPreference": "0",
    "trl.experimental.tpo.tpo_trainer.DataCollatorForTriplePreference": "0",
    "llamafactory.data.collator.PairwiseDataCollatorWithPadding": "0",
}
"""The collators, with the version of their library since which their rows are `[chosen x n; rejected x n]`.

Triples have `[reference x n]` behind, unless the collator leaves it out.
"""


def with_pairs(config: RehearsalConfig, collator: Any) -> RehearsalConfig:
    """The section, with `rows_per_sample` where a trainer's collator makes pairs or triples and nothing else is said.

    Args:
        config: The section.
        collator: `Trainer.data_collator`.

    Raises:
        ConfigError: The section has a setting that treats every row by itself.
    """
    if "rows_per_sample" in config.model_fields_set or not any(map(_makes_pairs, type(collator).__mro__)):
        return config
    section = config.model_dump(exclude_unset=True)
    rows = 3 if getattr(collator, "include_reference", False) else 2
    return RehearsalConfig.load({**section, "rows_per_sample": rows, "sample_layout": "halves"})


def _makes_pairs(kind: type) -> bool:
    since = COLLATORS.get(f"{kind.__module__}.{kind.__qualname__}")
    return since is not None and TorchVersion(metadata.version(kind.__module__.partition(".")[0])) >= since
