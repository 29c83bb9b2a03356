"""What preference training replays: rows that belong together, chosen ones first, or fields for each answer."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from torch.torch_version import TorchVersion

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.config.names import PARTITION

__all__ = ["with_answers", "with_pairs"]

COLLATORS = {
    "trl.trainer.dpo_trainer.DataCollatorForPreference": "0.29.0",
    "trl.trainer.dpo_trainer.DataCollatorForVisionPreference": "0",
    "trl.trainer.reward_trainer.DataCollatorForPreference": "0",
    "trl.experimental.tpo.tpo_trainer.DataCollatorForTriplePreference": "0",
    "llamafactory.data.collator.PairwiseDataCollatorWithPadding": "0",
    "swift.template.base.Template": "0",
}
"""The collators, with the version of their library since which their rows are `[chosen x n; rejected x n]`.

Triples have `[reference x n]` behind, unless the collator leaves it out. The template of ms-swift makes pairs in mode
`rlhf`.
"""


TRAINERS_OF_ANSWERS = (
    "trl.trainer.cpo_trainer.CPOTrainer",
    "trl.trainer.orpo_trainer.ORPOTrainer",
    "trl.experimental.cpo.cpo_trainer.CPOTrainer",
    "trl.experimental.orpo.orpo_trainer.ORPOTrainer",
)
"""Trainers whose batches have fields for each answer, from which alone they compute their loss, beside texts."""

ANSWERS = tuple(
    f"{answer}_{name}" for answer in ("chosen", "rejected") for name in ("input_ids", "attention_mask", "labels")
)


def with_answers(config: RehearsalConfig, trainer: Any) -> RehearsalConfig:
    """The section, with the `fields` of both answers where a trainer's batches have texts beside them.

    Args:
        config: The section.
        trainer: A `transformers.Trainer`.
    """
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(trainer).__mro__}
    if config.fields is not None or names.isdisjoint(TRAINERS_OF_ANSWERS):
        return config
    if getattr(trainer, "is_encoder_decoder", False):  # whose model reads the prompts
        return config
    keys = [key for key in (config.buffer.partition_by, config.buffer.score_by) if key not in (None, PARTITION, "loss")]
    return RehearsalConfig.load({**config.model_dump(exclude_unset=True), "fields": [*ANSWERS, *keys]})


def with_pairs(config: RehearsalConfig, collator: Any) -> RehearsalConfig:
    """The section, with `rows_per_sample` where a trainer's collator makes pairs or triples and nothing else is said.

    Args:
        config: The section.
        collator: Makes the batches; see `collator_of`.

    Raises:
        ConfigError: The section has a setting that treats every row by itself.
    """
    known = any(map(_makes_pairs, type(collator).__mro__)) and getattr(collator, "mode", "rlhf") == "rlhf"
    if "rows_per_sample" in config.model_fields_set or not known:
        return config
    section = config.model_dump(exclude_unset=True)
    rows = 3 if getattr(collator, "include_reference", False) else 2
    return RehearsalConfig.load({**section, "rows_per_sample": rows, "sample_layout": "halves"})


def _makes_pairs(kind: type) -> bool:
    since = COLLATORS.get(f"{kind.__module__}.{kind.__qualname__}")
    if since in (None, "0"):
        return since is not None
    return TorchVersion(metadata.version(kind.__module__.partition(".")[0])) >= since
