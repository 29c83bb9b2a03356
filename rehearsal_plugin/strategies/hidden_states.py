"""Embeddings out of the hidden states of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rehearsal_plugin.core.tree import leaves_of
from rehearsal_plugin.errors import BatchError, ConfigError

__all__ = ["HiddenStates", "pooled"]


def pooled(hidden: Tensor, mask: Tensor | None, pool: Literal["mean", "last"]) -> Tensor:
    """One vector a row.

    Args:
        hidden: `[rows, tokens, width]`; or `[rows, width]`, which is taken as it is.
        mask: `[rows, tokens]`, not 0 where there is a token; None where all are. A row without any gives zeros.
        pool: The mean over its tokens, or the last of them, whichever side the padding is on.

    Returns:
        `[rows, width]` float32, without history.

    Raises:
        BatchError: The shapes do not fit.
    """
    hidden = hidden.detach()
    if hidden.ndim == 2:
        return hidden.to(torch.float32, copy=True)  # the model may go on with it in place
    if hidden.ndim != 3 or (mask is not None and mask.shape != hidden.shape[:2]):
        told = "" if mask is None else f" and a mask of shape {tuple(mask.shape)}"
        raise BatchError(
            f"hidden states of shape {tuple(hidden.shape)}{told} cannot be made embeddings; they are [rows, tokens, "
            "width] with a mask [rows, tokens], or [rows, width]; name another module or mask"
        )
    kept = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask != 0
    kept = kept.to(hidden.device)
    if pool == "last":
        last = (kept * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)).argmax(1)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
        return vectors.masked_fill(~kept.any(1, keepdim=True), 0)
    # Not times 0: attention without a single token gives NaN where there is padding.
    return hidden.float().masked_fill(~kept[:, :, None], 0).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)


class HiddenStates:
    """Listens to a model, and keeps the embeddings of the rows that it saw last.

    Args:
        module: Name of the module that is listened to, as `named_modules()` tells it.
        pool: See `pooled`.
        mask: Name of the model's argument that tells tokens from padding.
        training_only: Whether passes in evaluation mode are ignored.
    """

    def __init__(
        self,
        module: str,
        pool: Literal["mean", "last"] = "mean",
        mask: str = "attention_mask",
        *,
        training_only: bool = False,
    ) -> None:
        self._module, self._pool, self._mask, self._training_only = module, pool, mask, training_only
        self._arguments: list[str] = []  # of the model's forward, in their order
        self._inside = False  # the model's forward; a module may be called alone, too
        self._tokens: Tensor | None = None
        self._seen: Tensor | None = None
        self._hooks: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Listen to `model`, and no longer to another.

        Raises:
            ConfigError: It has no module of that name.
        """
        self.close()
        modules = dict(model.named_modules())
        if self._module not in modules:
            known = ", ".join(list(modules)[1:9])
            raise ConfigError(f"the model has no module '{self._module}'; it has {known} ...: see named_modules()")
        written = getattr(model, "_orig_mod", model)  # what `torch.compile` returns takes anything
        self._arguments = list(inspect.signature(written.forward).parameters)
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            modules[self._module].register_forward_hook(self._keep),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def take(self) -> Tensor:
        """The embeddings of the rows that the model saw last, `[rows, width]` float32.

        Raises:
            ConfigError: It has seen none.
        """
        if self._seen is None:
            raise ConfigError(
                f"no hidden states of module '{self._module}' have been seen; call watch(model), and the model, first"
            )
        return self._seen

    def close(self) -> None:
        """Listen no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._tokens = self._seen = None

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._inside = model.training or not self._training_only
        if not self._inside:
            return
        named = dict(zip(self._arguments, args, strict=False))
        given = [kwargs, named, *(value for value in args if isinstance(value, Mapping))]
        found = [leaves[self._mask] for leaves in map(leaves_of, given) if self._mask in leaves]
        self._tokens = found[0] if found and isinstance(found[0], Tensor) else None

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._inside:
            return
        tensors = [leaf for leaf in leaves_of(output).values() if isinstance(leaf, Tensor) and leaf.ndim > 1]
        if not tensors:
            raise BatchError(f"module '{self._module}' gives no tensor of hidden states; name another one")
        self._seen = pooled(tensors[0], self._tokens, self._pool)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside = False
