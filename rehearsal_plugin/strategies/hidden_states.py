"""Embeddings from the hidden states of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rehearsal_plugin.config.names import Pool
from rehearsal_plugin.core.tree import leaves_of
from rehearsal_plugin.errors import BatchError, ConfigError

__all__ = ["HiddenStates", "pooled"]


def pooled(hidden: Tensor, mask: Tensor | None, pool: Pool) -> Tensor:
    """Pool hidden states into one vector for each row.

    Args:
        hidden: `[rows, tokens, width]`; or `[rows, width]`, which is not pooled.
        mask: `[rows, tokens]`, 0 at padding; None without padding. A row of padding alone gives zeros.
        pool: The mean over the tokens of a row, or its last token; padding may be on either side.

    Returns:
        `[rows, width]` float32, without gradients.

    Raises:
        BatchError: The shapes do not fit together.
    """
    hidden = hidden.detach()
    if hidden.ndim == 2:
        return hidden.to(torch.float32, copy=True)  # the model may change it in place
    if hidden.ndim != 3 or (mask is not None and mask.shape != hidden.shape[:2]):
        with_mask = "" if mask is None else f" and a mask of shape {tuple(mask.shape)}"
        raise BatchError(
            f"hidden states of shape {tuple(hidden.shape)}{with_mask} cannot be made embeddings; they are [rows, "
            "tokens, width] with a mask [rows, tokens], or [rows, width]; name another module or mask"
        )
    kept = torch.ones(hidden.shape[:2], dtype=torch.bool, device="cpu") if mask is None else mask != 0
    kept = kept.to(hidden.device)
    if pool == "last":
        # argmax of the positions counted from 1, with 0 at padding, is the last token.
        last = (kept * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)).argmax(1)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
        return vectors.masked_fill(~kept.any(1, keepdim=True), 0)
    # Filled, not multiplied by 0: attention over padding alone gives NaN there.
    return hidden.float().masked_fill(~kept[:, :, None], 0).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)


class HiddenStates:
    """Watches a model with forward hooks, and keeps the embeddings of the rows of its last forward.

    Args:
        module: Name of the module with the hidden states, as in `named_modules()`.
        pool: See `pooled`.
        mask: Name of the model's argument with the attention mask.
        training_only: Whether passes in evaluation mode are ignored.
    """

    def __init__(
        self,
        module: str,
        pool: Pool = "mean",
        mask: str = "attention_mask",
        *,
        training_only: bool = False,
    ) -> None:
        self._module, self._pool, self._mask, self._training_only = module, pool, mask, training_only
        self._arguments: list[str] = []  # of the model's forward, in their order
        self._inside = False  # whether a forward of the model runs; its module may be called alone, too
        self._tokens: Tensor | None = None
        self._embeddings: Tensor | None = None
        self._hooks: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Watch `model`, and no other any more.

        Raises:
            ConfigError: The model has no module of that name.
        """
        from rehearsal_plugin.strategies.uncompiled_hook import UncompiledHook  # takes a while

        self.close()
        modules = dict(model.named_modules())
        if self._module not in modules:
            names = ", ".join(list(modules)[1:9])
            raise ConfigError(f"the model has no module '{self._module}'; it has {names} ...: see named_modules()")
        original = getattr(model, "_orig_mod", model)  # a compiled module takes any arguments
        self._arguments = list(inspect.signature(original.forward).parameters)
        self._hooks = [
            model.register_forward_pre_hook(UncompiledHook(self._begin_forward), with_kwargs=True),
            modules[self._module].register_forward_hook(UncompiledHook(self._keep_states)),
            model.register_forward_hook(self._end_forward, always_call=True),
        ]

    def take(self) -> Tensor:
        """The embeddings of the rows of the last forward, `[rows, width]` float32.

        Raises:
            ConfigError: There was no forward yet.
        """
        if self._embeddings is None:
            raise ConfigError(
                f"no hidden states of module '{self._module}' have been seen; call watch(model), and the model, first"
            )
        return self._embeddings

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._tokens = self._embeddings = None

    def _begin_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._inside = model.training or not self._training_only
        if not self._inside:
            return
        named = dict(zip(self._arguments, args, strict=False))
        batches = [kwargs, named, *(value for value in args if isinstance(value, Mapping))]
        masks = [leaves[self._mask] for leaves in map(leaves_of, batches) if self._mask in leaves]
        self._tokens = masks[0] if masks and isinstance(masks[0], Tensor) else None

    def _keep_states(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._inside:
            return
        tensors = [leaf for leaf in leaves_of(output).values() if isinstance(leaf, Tensor) and leaf.ndim > 1]
        if not tensors:
            raise BatchError(f"module '{self._module}' gives no tensor of hidden states; name another one")
        self._embeddings = pooled(tensors[0], self._tokens, self._pool)

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside = False
