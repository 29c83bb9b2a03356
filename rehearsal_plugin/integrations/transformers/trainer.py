"""What a Hugging Face Trainer is asked for: its section, its ranks, and how it scales a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rehearsal_plugin.config import RehearsalConfig, find_block
from rehearsal_plugin.core.tree import without
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import ConfigError
from rehearsal_plugin.integrations.deepspeed.engine import connect
from rehearsal_plugin.integrations.handle import Handle
from rehearsal_plugin.integrations.inject.forward import finish, needs_outputs
from rehearsal_plugin.rehearsal import Rehearsal

__all__ = ["Visible", "hook", "ranks_factor", "scale_of", "scores_of", "section_of", "start"]


class Visible:
    """A loader whose batches lack some fields; everything else is the wrapped one's.

    Args:
        loader: Of batches for evaluation.
        hidden: Names of the fields.
    """

    def __init__(self, loader: Any, hidden: list[str]) -> None:
        self._loader, self._hidden = loader, hidden

    def __iter__(self) -> Iterator[Any]:
        return (without(batch, self._hidden) for batch in self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_loader" not in self.__dict__:  # copying and pickling look before __init__
            raise AttributeError(name)
        return getattr(self._loader, name)


def section_of(trainer: Any) -> RehearsalConfig | None:
    """The section in the DeepSpeed config of a trainer, whether its arguments name that or Accelerate does."""
    plugin = trainer.args.deepspeed_plugin
    block = None if plugin is None else find_block(plugin.hf_ds_config.config)
    return None if block is None else RehearsalConfig.load(block)


def start(trainer: Any, config: RehearsalConfig) -> Handle:
    """A rehearsal of the ranks of a trainer, which is left as it is.

    Raises:
        ConfigError: Which ranks see the same data is not known, or the section cannot be used with the engine.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Handle(Rehearsal(config, LocalTransport()))
    if trainer.is_deepspeed_enabled:
        return connect(trainer.model_wrapped, config)
    peers = trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    if peers > 1:
        raise ConfigError(
            f"{peers} ranks of this trainer see the same data, and which is known only under DeepSpeed; use DeepSpeed, "
            "or data parallelism alone"
        )
    return Handle(Rehearsal(config))


def ranks_factor(trainer: Any, items: Any) -> int:
    """What the trainer multiplies a loss by that is divided by the `items` tokens of all ranks; None for no number."""
    if items is None or not trainer.args.average_tokens_across_devices:
        return 1
    ranks = trainer.accelerator.num_processes // trainer.get_tp_size()
    return int(ranks if trainer.args.n_gpu <= 1 else trainer.args.n_gpu)


def scale_of(trainer: Any, passes: int, items: Any) -> float:
    """What a term that is a mean over a micro-batch is multiplied by, so that it becomes one over all of a step.

    Args:
        trainer: Which divides a loss by the micro-batches, unless it takes it for scaled already.
        passes: Micro-batches of the step.
        items: Tokens that the loss is divided by; None for a mean.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_items = trainer.model_accepts_loss_kwargs and items is not None
        scaled = by_items or trainer.compute_loss_func is not None
    return 1.0 / ((max(1, passes) if scaled else 1) * ranks_factor(trainer, items))


def hook(rehearsal: Rehearsal, model: nn.Module, scale: Callable[[], float]) -> list[Any]:
    """Let a strategy see what the model makes of training batches, where it wants to."""
    if not needs_outputs(rehearsal):
        return []

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled anew whenever a number changes
    def answered(module: nn.Module, _: Any, outputs: Any) -> Any:
        live = module.training and torch.is_grad_enabled() and not rehearsal.closed
        return finish(rehearsal, outputs, scale()) if live else outputs

    return [model.register_forward_hook(answered)]


def scores_of(outputs: Any) -> Tensor:
    """The logits of a model.

    Raises:
        ConfigError: It gives none.
    """
    logits = outputs.get("logits") if hasattr(outputs, "get") else outputs
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"RehearsalCallback.loss(criterion) takes a model that gives a tensor or 'logits', not a "
            f"{type(outputs).__name__} without them"
        )
    return logits
