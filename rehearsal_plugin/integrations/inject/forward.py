"""Injection at a model's forward: replayed rows join the arguments of a training pass."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rehearsal_plugin.core.tree import without
from rehearsal_plugin.errors import BatchError
from rehearsal_plugin.integrations.inject.arguments import ForwardArguments
from rehearsal_plugin.integrations.inject.recomputation import in_backward, in_checkpointed_region, is_called_by_itself
from rehearsal_plugin.integrations.inject.training_pass import TrainingPass
from rehearsal_plugin.rehearsal import Rehearsal
from rehearsal_plugin.runtime.sample_losses import fused_log_probs

__all__ = ["CopiedInjection", "ForwardInjection", "add_strategy_term", "needs_outputs"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

MOST_PASSES = 64  # that are remembered at a time
FEW_PASSES = 8  # the same, until it is known that batches come again in a step


class CopiedInjection:
    """Stays in a copy of an attached model: hidden fields go, nothing is added, nothing is stored.

    Args:
        arguments: Of the model's forward.
        hidden: Names of the hidden fields.
    """

    def __init__(self, arguments: ForwardArguments, hidden: Sequence[str]) -> None:
        self._arguments, self._hidden = arguments, hidden

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Forward pre-hook of the copy."""
        names = self._arguments.names(len(args))
        if not self._hidden or kwargs.keys() & names:
            return args, kwargs
        return self._arguments.place(names, without({**dict(zip(names, args, strict=True)), **kwargs}, self._hidden))

    def after(self, _module: nn.Module, _args: tuple[Any, ...], outputs: Any) -> Any:
        """Forward hook of the copy."""
        return outputs


class ForwardInjection:
    """Adds replayed rows to the arguments of a model's forward, in training passes only.

    Fields of a row have the names of the model's parameters, for positional arguments too. Copies of the model, by
    `copy.deepcopy` or pickled, get a `CopiedInjection` in place of this.

    Args:
        rehearsal: Source of the rows.
        module: The model.
    """

    def __init__(self, rehearsal: Rehearsal, module: nn.Module) -> None:
        self._rehearsal, self._module = rehearsal, module
        self._arguments = ForwardArguments(module)
        self._passes: list[TrainingPass] = []  # of this step, oldest first
        self._current: TrainingPass | None = None  # whose forward runs
        self._again_now = False  # whether it has been seen before
        self._nested = 0  # calls of the model by itself, within that forward
        self._first_step = rehearsal.steps
        self._recurs = False  # whether a batch has come again after its backward pass, as in a closure

    def register(self) -> None:
        """Inject at every call of the model from now on, by hooks of the module."""
        self._module.register_forward_pre_hook(PreHook(self), with_kwargs=True, prepend=True)
        self._module.register_forward_hook(PostHook(self), always_call=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Forward pre-hook; a shallow copy of the model, which shares its hooks, is not augmented."""
        return self(args, kwargs) if module is self._module else self._copied().before(module, args, kwargs)

    def after(self, module: nn.Module, _: tuple[Any, ...], outputs: Any) -> Any:
        """Forward hook."""
        if module is not self._module:
            return outputs
        if self._nested:
            self._nested -= 1
            return outputs
        if outputs is None and sys.exc_info()[0] is not None:
            self.give_up()
        return self.finish(outputs)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments for the model, with replayed rows in a training pass and without hidden fields in any.

        Raises:
            BatchError: The fields are not those of the first batch, or the pass cannot be told from another one.
        """
        if self._current is not None and is_called_by_itself(self._module):
            self._nested += 1
            return args, kwargs
        self.give_up()  # a forward that was interrupted, as by Ctrl-C
        names = self._arguments.names(len(args))
        if kwargs.keys() & names:  # an argument given twice: the model raises its own TypeError
            return args, kwargs
        batch = {**dict(zip(names, args, strict=True)), **kwargs}
        fields = self._augmented(batch) if self._is_training else self._rehearsal.visible(batch)
        return self._arguments.place(names, fields)

    def finish(self, outputs: Any) -> Any:
        """The outputs for the caller; see `add_strategy_term`."""
        current, self._current = self._current, None
        if current is None:
            return outputs
        rehearsal = self._rehearsal
        expected = rehearsal.pending.awaits(rehearsal.pending.expected)
        if needs_outputs(rehearsal):
            outputs = add_strategy_term(rehearsal, outputs)
        answered = expected and not rehearsal.pending.awaits(rehearsal.pending.expected)
        return current.watch.watch(outputs, checked=not rehearsal.pending.must_be_asked, answered=answered)

    def give_up(self) -> None:
        """Forget the pass whose forward failed: its batch may come again as if for the first time."""
        failed, self._current, self._nested = self._current, None, 0
        if failed is None or self._again_now:
            return
        self._passes = [one for one in self._passes if one is not failed]
        if not self._rehearsal.closed and not failed.watch.is_dropped:
            self._rehearsal.drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedInjection:
        return self._copied()

    def __reduce__(self) -> tuple[Any, ...]:
        return CopiedInjection, (self._arguments, list(self._rehearsal.config.hidden or ()))

    @property
    def _is_training(self) -> bool:
        live = not self._rehearsal.closed and self._module.training
        return live and (torch.is_grad_enabled() or in_checkpointed_region())

    def _copied(self) -> CopiedInjection:
        return CopiedInjection(self._arguments, list(self._rehearsal.config.hidden or ()))

    def _augmented(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The fields of a training pass: those of an earlier one where it is the same."""
        recomputed = in_backward()
        self._passes = [one for one in self._passes if not one.watch.is_dropped]
        same = next((one for one in reversed(self._passes) if one.is_of(batch)), None) if self._passes else None
        if same is not None and same.watch.done and not recomputed:
            self._recurs = True
            same = same if same.is_unchanged else None
        if same is not None:
            return self._again(same, batch, recomputed)
        self._check_new(recomputed)
        kept = self._recurs or self._rehearsal.steps == self._first_step
        self._passes = [one for one in self._passes if kept or not one.watch.done]
        shared = self._share_outputs()
        fields: dict[str, Any] = self._rehearsal.augment(batch)
        self._current, self._again_now = TrainingPass(self._rehearsal, batch, fields, copied=kept), False
        self._current.watch.shared = shared
        most = MOST_PASSES if self._recurs or not kept else FEW_PASSES
        self._passes = [*self._passes[1 - most :], self._current]
        return fields

    def _share_outputs(self) -> bool:
        """Whether outputs of an earlier pass wait for their backward pass; they are marked as well."""
        waiting = [one.watch for one in self._passes if one.watch.waits]
        for watch in waiting:
            watch.shared = True
        return bool(waiting)

    def _again(self, same: TrainingPass, batch: dict[str, Any], recomputed: bool) -> dict[str, Any]:
        """The rows of an earlier pass, to be seen again; nothing is offered twice."""
        if needs_outputs(self._rehearsal):
            raise BatchError(
                "the model is called twice with the same batch in a step"
                f"{', by activation checkpointing around the call' if recomputed else ''}, and the rehearsal needs "
                f"one answer for each batch ({self._rehearsal.pending.need}); checkpoint the layers inside the model, "
                "or set rehearsal.inject to 'loader'"
            )
        if recomputed and same.cuts_off(batch):
            raise BatchError(
                "reentrant activation checkpointing around the model's call detaches its inputs, and gradients of what "
                "computed them would be lost; give checkpoint(..., use_reentrant=False)"
            )
        self._current, self._again_now = same, True
        if not recomputed:
            same.watch.done, same.watch.repeated = False, True
        return same.fields_for(batch)

    def _check_new(self, recomputed: bool) -> None:
        """Refuse a batch whose rows would not be those that its outputs are used with."""
        if recomputed:
            raise BatchError(
                "a training pass through the model began within a backward pass, and its batch is none of this step's: "
                "activation checkpointing that copies its inputs; checkpoint the layers inside the model, or set "
                "rehearsal.inject to 'loader'"
            )
        if any(one.watch.open for one in self._passes):
            raise BatchError(
                "a second training pass through the model began before the backward pass of the first, whose outputs "
                "hold no loss: their replayed rows are others, so rows of the two do not belong together; set "
                "rehearsal.inject to 'loader', or run a pass that trains nothing under torch.no_grad()"
            )


class PreHook:
    """Forward pre-hook that a model can be copied and pickled with; a copy has the injection of a copy."""

    def __init__(self, injection: ForwardInjection | CopiedInjection) -> None:
        self._injection = injection

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return self._injection.before(module, args, kwargs)


class PostHook(PreHook):
    """Forward hook, as `PreHook`."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        return self._injection.after(module, args, outputs)


def needs_outputs(rehearsal: Rehearsal) -> bool:
    """Whether the strategy or the metrics use the model's outputs."""
    return rehearsal.strategy.records or not rehearsal.strategy.plain or rehearsal.measures


def add_strategy_term(rehearsal: Rehearsal, outputs: Any, scale: float = 1.0) -> Any:
    """The outputs of a training pass, with the strategy's term in a loss, or in the `log_probs` for one, of the model.

    Args:
        rehearsal: Rehearsal that augmented the batch.
        outputs: Outputs of the model.
        scale: Factor of the model's loss, against the mean over the micro-batch.

    Raises:
        ConfigError: The strategy needs the losses of new and replayed rows apart.
    """
    has_loss = isinstance(outputs, Mapping) and outputs.get("loss") is not None
    return rehearsal.complete(outputs, scale) if has_loss or fused_log_probs(outputs) is not None else outputs
