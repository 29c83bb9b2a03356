"""Trainers that compute their loss themselves: which strategies and settings can work, told before the first step.

TRL gives the model a fused head: called with `fused_lm_head=True`, it returns the log-probability of each label and no
logits, and the trainer makes its loss of these.

| setting | with the fused head of `SFTTrainer` |
|---|---|
| `losses_every`, `guard`, `ratio.budget`, `buffer.score_by: loss` | from the log-probabilities: the cross-entropy |
| `strategy.loss_weight`, `strategy.partition_weights`, `ratio.by` | scaled in replayed rows; `loss_type: nll` alone |
| strategies that need logits: all but `er` | refused |
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from rehearsal_plugin.config.by_row import settings_by_loss
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.inject.forward import needs_outputs
from rehearsal_plugin.rehearsal import Rehearsal

__all__ = ["check_own_loss", "has_fused_head"]

FUSED = "fused_lm_head"
CURE = "give the trainer compute_loss_func=callback.loss(criterion), with which the model gives logits"


def check_own_loss(trainer: Any, rehearsal: Rehearsal) -> None:
    """Refuse what the loss of a trainer leaves without effect, or makes wrong.

    Raises:
        ConfigError: There is such a setting.
    """
    if not needs_outputs(rehearsal) or trainer.compute_loss_func is not None:
        return
    if trainer.label_smoother is not None:
        raise ConfigError(
            "with label_smoothing_factor the Trainer computes the loss, and the rehearsal needs that of the rows "
            "apart; give Trainer compute_loss_func=callback.loss(criterion) with a criterion that smooths labels"
        )
    if not has_fused_head(trainer.model):
        return
    config, name = rehearsal.config, type(trainer).__name__
    if config.strategy.name != "er":
        raise ConfigError(
            f"strategy '{config.strategy.name}' needs logits, and {name} has the model compute log-probabilities "
            f"without them; {CURE}, or leave the strategy at 'er'"
        )
    settings = settings_by_loss(config)
    if settings and not _is_sft(trainer):
        raise ConfigError(
            f"{settings[0]} takes the loss of a row from the log-probabilities of its labels, and that of {name} is "
            "another one; leave it out"
        )
    weights = [setting for setting in settings if setting.startswith(("rehearsal.strategy", "rehearsal.ratio.by"))]
    loss_type = getattr(trainer.args, "loss_type", "nll")
    if weights and loss_type != "nll":
        raise ConfigError(
            f"{weights[0]} weighs log-probabilities, of which the loss_type '{loss_type}' of {name} is no sum; set "
            f"loss_type='nll', or {CURE}"
        )


def has_fused_head(model: nn.Module) -> bool:
    """Whether TRL has given a model, or one inside it as with PEFT, a head that computes log-probabilities."""
    patched = (vars(module).get("forward") for module in model.modules())
    return any(FUSED in inspect.signature(one, follow_wrapped=False).parameters for one in _unwrapped(patched))


def _unwrapped(functions: Iterable[Any]) -> Iterator[Any]:
    """Functions, and those that they wrap: mixed precision wraps a forward once more."""
    for function in functions:
        while callable(function):
            yield function
            function = getattr(function, "__wrapped__", None)


def _is_sft(trainer: Any) -> bool:
    """Whether the loss is the mean cross-entropy of the labels."""
    kinds = type(trainer).__mro__
    return any(kind.__module__.partition(".")[0] == "trl" and kind.__name__ == "SFTTrainer" for kind in kinds)
