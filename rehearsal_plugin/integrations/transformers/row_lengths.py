"""What a trainer's collator pads rows with, and how long they get, so that a section need not say it."""

from __future__ import annotations

from typing import Any

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.config.replay import PaddingConfig
from rehearsal_plugin.integrations.transformers.dataset_column import collator_of

__all__ = ["with_padding"]

HUGGING_FACE = "transformers.data.data_collator."
COLLATORS = (
    f"{HUGGING_FACE}DataCollatorWithPadding",
    f"{HUGGING_FACE}DataCollatorForTokenClassification",
    f"{HUGGING_FACE}DataCollatorForSeq2Seq",
    f"{HUGGING_FACE}DataCollatorForLanguageModeling",
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling",
    "trl.trainer.dpo_trainer.DataCollatorForPreference",
    "trl.trainer.reward_trainer.DataCollatorForPreference",
    "trl.trainer.kto_trainer.DataCollatorForUnpairedPreference",
    "trl.experimental.tpo.tpo_trainer.DataCollatorForTriplePreference",
    "trl.experimental.utils.DPODataCollatorWithPadding",
)
"""Collators that pad the sequences of a batch to the longest of them, behind."""

LONGEST = 4096
"""Positions up to which the limit of a tokenizer is taken for the length of the rows; many name that of the model."""


def with_padding(config: RehearsalConfig, trainer: Any) -> RehearsalConfig:
    """The section, with `padding` where a trainer's collator pads, and the section does not say how.

    Args:
        config: The section.
        trainer: A `transformers.Trainer`.
    """
    if config.padding is not None or not _pads(trainer):
        return config
    collator, arguments = collator_of(trainer), trainer.args
    tokenizer = getattr(collator, "tokenizer", None) or getattr(trainer, "processing_class", None)
    token_id = getattr(collator, "pad_token_id", getattr(tokenizer, "pad_token_id", None))
    longest = getattr(arguments, "max_length", None) or getattr(tokenizer, "model_max_length", None)
    known = longest is not None and (longest <= LONGEST or getattr(arguments, "max_length", None) is not None)
    padding = PaddingConfig(length=longest if known else None, token_id=token_id)
    return config.model_copy(update={"padding": padding})


def _pads(trainer: Any) -> bool:
    """Whether the trainer's collator is known to pad rows behind."""
    tokenizer = getattr(trainer.data_collator, "tokenizer", None)
    if getattr(tokenizer, "padding_side", "right") != "right":
        return False
    kinds = type(collator_of(trainer)).__mro__
    return any(f"{kind.__module__}.{kind.__qualname__}" in COLLATORS for kind in kinds)
