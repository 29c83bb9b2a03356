"""Pipeline parallelism of DeepSpeed: rows join the micro-batches that the first and the last stage pull.

The first stage uses the inputs of a micro-batch and the last its labels. Each keeps whole rows, in the buffer of its
own data-parallel group, and both inject the same ones. The stages between them pull no batches and keep no rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from rehearsal_plugin.config import RehearsalConfig
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.strategies import make_strategy

__all__ = ["MicroBatchInjection", "check_pipeline", "inject_at_stage", "pulls_batches"]

SHAPES = "PipelineModule(..., dynamic_shape=True)"


class MicroBatchInjection:
    """Adds replayed rows to the micro-batches that a stage pulls while the model trains.

    Args:
        rehearsal: Source of the rows.
        engine: The pipeline engine.

    Attributes:
        before: Function of the script that every micro-batch goes through first; None for none.
    """

    def __init__(self, rehearsal: Rehearsal, engine: Any) -> None:
        self._rehearsal, self._module = rehearsal, engine.module
        self.before: Callable[[Any], Any] | None = engine.batch_fn

    def __call__(self, batch: Any) -> Any:
        """The micro-batch for the stage.

        Raises:
            BatchError: Its fields are not those of the first one.
        """
        batch = batch if self.before is None else self.before(batch)
        training = self._module.training and torch.is_grad_enabled() and not self._rehearsal.closed
        return self._rehearsal.augment(batch) if training else self._rehearsal.visible(batch)


def check_pipeline(engine: Any, config: RehearsalConfig) -> None:
    """Refuse settings that a pipeline cannot support.

    Args:
        engine: A `PipelineEngine`.
        config: The `rehearsal` section.

    Raises:
        ConfigError: Shapes would change from step to step, or something needs the model's outputs beside the batch.
    """
    if config.inject == "loader":
        raise ConfigError(
            "rehearsal.inject is 'loader', and a PipelineEngine pulls its micro-batches itself; leave it at 'forward'"
        )
    keys = [key for key, needed in _keys_with_outputs(config).items() if needed]
    if keys:
        raise ConfigError(
            f"{' and '.join(keys)} needs the model's outputs beside the rows, which no stage of a PipelineEngine has; "
            "use strategy 'er' with loss_weight 1 there"
        )
    if engine.num_stages == 1 or engine.module.dynamic_shape:
        return
    if config.mode == "append":
        raise ConfigError(
            "with rehearsal.mode 'append' micro-batches grow as soon as rows are replayed, and the stages of this "
            f"pipeline exchange tensors of one shape; set it to 'replace', or make the model with {SHAPES}"
        )
    if config.padding is not None:
        raise ConfigError(
            "with rehearsal.padding micro-batches are as long as their longest row, and the stages of this pipeline "
            f"exchange tensors of one shape; make the model with {SHAPES}"
        )


def pulls_batches(engine: Any) -> bool:
    """Whether the stage of this rank is the first or the last."""
    return bool(engine.is_first_stage() or engine.is_last_stage())


def inject_at_stage(engine: Any, rehearsal: Rehearsal) -> None:
    """Add replayed rows to the micro-batches of a stage, after any function given to `set_batch_fn`.

    Args:
        engine: A `PipelineEngine` that pulls batches.
        rehearsal: Source of the rows.
    """
    rehearsal.report.joined_at = "in the micro-batches that a stage pulls"
    injection = engine.batch_fn = MicroBatchInjection(rehearsal, engine)

    @functools.wraps(engine.set_batch_fn)
    def set_batch_fn(fn: Callable[[Any], Any] | None) -> None:
        injection.before = fn

    engine.set_batch_fn = set_batch_fn


def _keys_with_outputs(config: RehearsalConfig) -> dict[str, bool]:
    """Keys of the section that may need the model's outputs beside the rows, and whether they do."""
    strategy = make_strategy(config.strategy)
    return {
        f"rehearsal.strategy.name '{config.strategy.name}'": strategy.records or not strategy.plain,
        "rehearsal.strategy.partition_weights": config.strategy.partition_weights is not None,
        "rehearsal.buffer.score_by 'loss'": config.buffer.by_loss,
        "rehearsal.ratio.budget": config.ratio_budget is not None,
        "rehearsal.sampling.weights 'forgetting'": config.sampling.weights == "forgetting",
        "rehearsal.losses_every": config.losses_every > 0,
        "rehearsal.retrieval.module": config.retrieval is not None and config.retrieval.module is not None,
    }
