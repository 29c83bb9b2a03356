"""Settings that need something of the model for each sample, where samples are not the rows of a batch."""

from __future__ import annotations

from typing import Protocol

from rehearsal_plugin.config.amounts import RatioBudget
from rehearsal_plugin.config.buffer import BufferConfig
from rehearsal_plugin.config.replay import SamplingConfig, StrategyConfig
from rehearsal_plugin.config.retrieval import RetrievalConfig

__all__ = ["settings_by_loss", "settings_by_output"]


class Settings(Protocol):
    """What is looked at of a `RehearsalConfig`."""

    @property
    def buffer(self) -> BufferConfig: ...

    @property
    def strategy(self) -> StrategyConfig: ...

    @property
    def losses_every(self) -> int: ...

    @property
    def ratio(self) -> float | RatioBudget | None: ...

    @property
    def sampling(self) -> SamplingConfig: ...

    @property
    def retrieval(self) -> RetrievalConfig | None: ...

    @property
    def inject(self) -> str | None: ...

    @property
    def mode(self) -> str: ...


def settings_by_output(config: Settings) -> list[str]:
    """The settings that need an output of the model for each sample."""
    settings = {
        f"rehearsal.strategy.name '{config.strategy.name}'": config.strategy.name != "er",
        "rehearsal.buffer.score_by": config.buffer.score_by is not None and not config.buffer.by_loss,
        "rehearsal.retrieval": config.retrieval is not None,
        "rehearsal.inject 'loader' with mode 'replace'": (config.inject, config.mode) == ("loader", "replace"),
    }
    return [setting for setting, is_used in settings.items() if is_used]


def settings_by_loss(config: Settings) -> list[str]:
    """The settings that need a loss for each sample, for which those of its tokens do."""
    settings = {
        "rehearsal.strategy.loss_weight": config.strategy.loss_weight != 1.0,
        "rehearsal.strategy.partition_weights": config.strategy.partition_weights is not None,
        "rehearsal.ratio.by": isinstance(config.ratio, RatioBudget) and config.ratio.by != "ratio",
        "rehearsal.ratio.budget": isinstance(config.ratio, RatioBudget),
        "rehearsal.sampling.weights 'forgetting'": config.sampling.weights == "forgetting",
        "rehearsal.losses_every": bool(config.losses_every),
        "rehearsal.buffer.score_by": config.buffer.by_loss,
    }
    return [setting for setting, is_used in settings.items() if is_used]
