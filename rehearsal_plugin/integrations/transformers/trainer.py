"""Facts about a Hugging Face Trainer: its rehearsal section, its ranks, and the scale of its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from rehearsal_plugin.config import RehearsalConfig, find_block
from rehearsal_plugin.config.names import PARTITION
from rehearsal_plugin.core.tree import without
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.integrations.deepspeed.engine import connect
from rehearsal_plugin.integrations.handle import Handle
from rehearsal_plugin.integrations.inject.forward import add_strategy_term, needs_outputs
from rehearsal_plugin.integrations.transformers.collation import check_rows
from rehearsal_plugin.rehearsal import Rehearsal

__all__ = [
    "OutputsHook",
    "VisibleLoader",
    "augment_batch",
    "deepspeed_section",
    "hook_outputs",
    "logits_of",
    "loss_scale",
    "parallel_size",
    "ranks_factor",
    "start_rehearsal",
]


class VisibleLoader:
    """A loader whose batches lack the hidden fields; all other attributes are those of the wrapped loader.

    Args:
        loader: Batches for evaluation.
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


def deepspeed_section(trainer: Any) -> RehearsalConfig | None:
    """The section in the DeepSpeed config of a trainer, named by its arguments or by Accelerate; None without one."""
    plugin = trainer.args.deepspeed_plugin
    block = None if plugin is None else find_block(plugin.hf_ds_config.config)
    return None if block is None else RehearsalConfig.load(block)


def start_rehearsal(trainer: Any, config: RehearsalConfig) -> Handle:
    """Start a rehearsal over the ranks of a trainer, which stays unchanged.

    Raises:
        ConfigError: The ranks that see the same data are unknown, the trainer does not train with the other ranks, or
            the section cannot be used with the engine.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Handle(Rehearsal(config, LocalTransport()))
    if trainer.is_deepspeed_enabled:
        return connect(trainer.model_wrapped, config)
    if trainer.accelerator.num_processes == 1 and config.sampling.scope != "local":
        raise ConfigError(
            f"torch.distributed has {dist.get_world_size()} ranks, and this Trainer trains by itself, on all of the "
            "data: its model would be another one on each rank; on CPU ranks give TrainingArguments use_cpu=True, or, "
            "where ranks are meant to train models of their own, set rehearsal.sampling.scope to 'local'"
        )
    peers = parallel_size(trainer, "tp") * parallel_size(trainer, "cp") * parallel_size(trainer, "sp")
    if peers > 1:
        raise ConfigError(
            f"{peers} ranks of this trainer see the same data, and which is known only under DeepSpeed; use DeepSpeed, "
            "or data parallelism alone"
        )
    return Handle(Rehearsal(config))


def parallel_size(trainer: Any, kind: str) -> int:
    """Ranks that see the same data by tensor (`tp`), context (`cp`) or sequence (`sp`) parallelism; 1 without it.

    Releases of transformers differ in what they have: a method, or the config of Accelerate.
    """
    method = getattr(trainer, f"get_{kind}_size", None)
    if method is not None:
        return int(method())
    config = getattr(trainer.accelerator, "parallelism_config", None)
    return int(getattr(config, f"{kind}_size", 1) or 1)


def ranks_factor(trainer: Any, items: Any) -> int:
    """The factor on a loss that the trainer divides by the `items` tokens of all ranks; 1 where `items` is None."""
    if items is None or not trainer.args.average_tokens_across_devices:
        return 1
    ranks = trainer.accelerator.num_processes
    if TorchVersion(transformers.__version__) >= "5.10":  # earlier ones count ranks that see the same tokens
        ranks //= parallel_size(trainer, "tp")
    return int(ranks if trainer.args.n_gpu <= 1 else trainer.args.n_gpu)


def loss_scale(trainer: Any, passes: int, items: Any) -> float:
    """The factor that turns the mean over a micro-batch into its share of the mean over a step.

    Args:
        trainer: It divides losses by the number of micro-batches, unless it takes them for scaled already.
        passes: Micro-batches of the step.
        items: Tokens that the loss is divided by; None for a mean.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_items = trainer.model_accepts_loss_kwargs and items is not None
        scaled = by_items or trainer.compute_loss_func is not None
    return 1.0 / ((max(1, passes) if scaled else 1) * ranks_factor(trainer, items))


class OutputsHook:
    """Forward hook that hands training outputs of one model to the strategy; in copies of the model it does nothing.

    Args:
        rehearsal: Rehearsal that augments the batches; None in a copy.
        model: The model.
        scale: See `hook_outputs`.
    """

    def __init__(
        self, rehearsal: Rehearsal | None, model: nn.Module | None = None, scale: Callable[[], float] = lambda: 1.0
    ) -> None:
        self._rehearsal, self._model, self._scale = rehearsal, model, scale
        # Each new number would compile it again.
        self._finish = torch.compiler.disable(self._add_term)  # type: ignore[no-untyped-call]

    def __call__(self, module: nn.Module, _: Any, outputs: Any) -> Any:
        """The outputs, with the strategy's term in a training pass of the model."""
        return self._finish(outputs) if module is self._model and module.training else outputs

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputsHook:
        return OutputsHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return OutputsHook, (None,)

    def _add_term(self, outputs: Any) -> Any:
        rehearsal = self._rehearsal
        live = rehearsal is not None and torch.is_grad_enabled() and not rehearsal.closed
        return add_strategy_term(rehearsal, outputs, self._scale()) if live and rehearsal is not None else outputs


def hook_outputs(rehearsal: Rehearsal, model: nn.Module, scale: Callable[[], float]) -> list[Any]:
    """Hand the model's training outputs to the strategy, where it uses them; returns the hooks, to be removed."""
    return [model.register_forward_hook(OutputsHook(rehearsal, model, scale))] if needs_outputs(rehearsal) else []


def logits_of(outputs: Any) -> Tensor:
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


def augment_batch(trainer: Any, rehearsal: Rehearsal, batch: Any, counted: bool) -> Any:
    """A micro-batch with replayed rows, before the trainer counts its tokens.

    Args:
        trainer: Its arguments say which columns a batch keeps.
        rehearsal: Adds the rows.
        batch: The micro-batch.
        counted: The rows of the first one are held to its examples already; otherwise they are to the batch size.

    Raises:
        BatchError: The partition key is missing, the batch gives the beginnings of its documents, or the first one has
            more rows than the trainer gives examples to a batch.
    """
    if rehearsal.closed:
        return rehearsal.visible(batch)
    key = rehearsal.config.buffer.partition_by
    if key not in (None, PARTITION) and key not in batch:
        columns = getattr(trainer.train_dataset, "column_names", None)
        raise BatchError(
            f"rehearsal.buffer.partition_by names '{key}', which neither the batch nor the trainer's dataset has"
            + (f"; the dataset has {columns}" if columns else "")
            + "; give the dataset such a column, which a trainer that packs the dataset drops, or set "
            "rehearsal.buffer.partition for the whole job"
        )
    if not rehearsal.fed:
        rehearsal.report.joined_at = "as the Trainer reads its micro-batches"
        if not counted:
            examples = getattr(trainer, "_train_batch_size", None) or trainer.args.train_batch_size
            check_rows(batch, examples, rehearsal.config)
    return rehearsal.augment(batch, ahead=True)
