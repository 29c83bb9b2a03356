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
    "axolotl.utils.collators.batching.DataCollatorForSeq2Seq",
    "swift.template.base.Template",
)
"""Collators that pad the sequences of a batch to the longest of them, behind."""

CUTTING_COLLATORS = (
    "trl.trainer.dpo_trainer.DataCollatorForPreference",
    "trl.trainer.kto_trainer.DataCollatorForUnpairedPreference",
    "trl.experimental.tpo.tpo_trainer.DataCollatorForTriplePreference",
)
"""Collators that cut rows to their `max_length`."""

CUTTING_TRAINERS = ("trl.trainer.sft_trainer.SFTTrainer", "trl.trainer.reward_trainer.RewardTrainer")
"""Trainers that hold the examples of their dataset to `max_length` of their arguments."""


def with_padding(config: RehearsalConfig, trainer: Any) -> RehearsalConfig:
    """The section, with `padding` where a trainer's collator pads, and the section does not say how.

    Without a token to pad with, the rows of such a trainer have one length, and the section stays as it is.

    Args:
        config: The section.
        trainer: A `transformers.Trainer`.
    """
    collator = collator_of(trainer)
    if config.padding is not None or not _pads(collator):
        return config
    tokenizer = getattr(collator, "tokenizer", None) or getattr(trainer, "processing_class", None)
    token_id = getattr(collator, "pad_token_id", getattr(tokenizer, "pad_token_id", None))
    if token_id is None:
        return config
    return config.model_copy(update={"padding": PaddingConfig(length=_limit_of(trainer), token_id=token_id)})


def _limit_of(trainer: Any) -> int | None:
    """Positions that no row of a trainer exceeds; None where nothing holds rows to a limit.

    Some collators of TRL cut rows, and some trainers cut or drop long examples as they prepare their dataset. The limit
    of a tokenizer, `model_max_length`, is that of what it makes, not of a dataset that has its tokens already.
    """
    collator, arguments = collator_of(trainer), trainer.args
    if hasattr(collator, "max_length") and _names_of(collator).intersection(CUTTING_COLLATORS):
        limit = collator.max_length
    elif _names_of(trainer).intersection(CUTTING_TRAINERS):
        prepares = not (getattr(arguments, "dataset_kwargs", None) or {}).get("skip_prepare_dataset")
        limit = getattr(arguments, "max_length", None) if prepares else None
    else:
        return None
    multiple = getattr(collator, "pad_to_multiple_of", None) or 1
    return None if limit is None else -(-int(limit) // multiple) * multiple


def _pads(collator: Any) -> bool:
    """Whether a collator is known to pad rows behind."""
    tokenizer = getattr(collator, "tokenizer", None)
    side = getattr(collator, "padding_side", None) or getattr(tokenizer, "padding_side", None)
    return side in (None, "right") and not _names_of(collator).isdisjoint(COLLATORS)


def _names_of(value: object) -> set[str]:
    """Full names of the classes of a value."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(value).__mro__}
