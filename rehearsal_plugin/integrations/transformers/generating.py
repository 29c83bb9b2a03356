"""Trainers that generate the text they train on: their loaders give prompts, and only those could be replayed."""

from __future__ import annotations

from typing import Any

from rehearsal_plugin.errors import ConfigError

__all__ = ["refuse_generating"]

GENERATING = {
    "A2POTrainer",
    "AsyncDistillationTrainer",
    "AsyncGRPOTrainer",
    "DistillationTrainer",
    "GKDTrainer",
    "GOLDTrainer",
    "GRPOTrainer",
    "IWOPDTrainer",
    "MiniLLMTrainer",
    "OnlineDPOTrainer",
    "PPOTrainer",
    "RLOOTrainer",
    "SDFTTrainer",
    "SDPOTrainer",
}
"""Classes of TRL 0.18 to 1.16; their modules changed between releases. Subclasses generate, too."""


def refuse_generating(trainer: Any) -> None:
    """Refuse a trainer that generates what it trains on.

    Raises:
        ConfigError: It does; the message names its class.
    """
    generating = next((kind.__name__ for kind in type(trainer).__mro__ if _generates(kind)), None)
    if generating is None or getattr(trainer.args, "lmbda", None) == 0:  # the share of batches that are generated
        return
    name = type(trainer).__name__
    named = name if name == generating else f"{name} (a {generating})"
    raise ConfigError(
        f"{named} trains on text that it generates, and its loader gives prompts alone, so what the model learned from "
        "cannot be replayed; run it without a rehearsal, or train on texts that are there, as with SFTTrainer"
    )


def _generates(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "trl" and kind.__name__ in GENERATING
