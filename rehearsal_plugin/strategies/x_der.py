"""X-DER: recorded scores are completed for classes that came later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rehearsal_plugin.config import StrategyConfig
from rehearsal_plugin.errors import BatchError, ConfigError
from rehearsal_plugin.strategies.base import Part, register
from rehearsal_plugin.strategies.der_plus_plus import DarkExperienceReplayPlusPlus

__all__ = ["ExtendedDarkExperienceReplay"]


@register("x-der")
class ExtendedDarkExperienceReplay(DarkExperienceReplayPlusPlus):
    """DER++ in which the recorded scores of a row are completed for classes that were unknown at the time.

    Scores for classes that a model has never seen carry no information, and keeping them would hurt these classes. Once
    such a class appears, its scores in replayed rows are replaced by the present ones, scaled so that none exceeds
    `gamma` times the recorded score of the row's class. The row is updated on the rank that holds it:

        classes     0 (the row's)  1    2 (new)  3 (new)
        recorded    2.0           -0.5  0.1      0.2        gamma .75: limit 1.5
        present     1.8           -0.4  3.0      1.0        highest new score 3.0, so both are halved
        refreshed   2.0           -0.5  1.5      0.5

    After Boschini et al., "Class-incremental continual learning into the eXtended DER-verse", TPAMI 2022; their further
    losses on future classes are left out.

    For classification: outputs are scores `[rows, classes]`, the first target is the class `[rows]` int64.
    """

    reads = frozenset({"alpha", "beta", "gamma", "outputs"})
    refreshes = True

    def __init__(self, config: StrategyConfig) -> None:
        super().__init__(config)
        self._known: Tensor | None = None  # [classes] bool, the classes met so far

    def state(self, new: Part) -> dict[str, Tensor]:
        """See `Strategy.state`: `scores` and the classes `known` at the time (bool), both `[rows, classes]`."""
        scores = self._checked_scores(new.outputs)
        if self._known is None:
            raise ConfigError(
                "strategy 'x-der' needs the labels beside the outputs; let the model return scores and compute the "
                "loss with rehearsal.loss(criterion, outputs, labels)"
            )
        return {"scores": scores, "known": self._known.repeat(len(scores), 1)}  # `loss` changes the known classes later

    def state_dict(self) -> dict[str, Tensor]:
        """See `Strategy.state_dict`: the known classes."""
        return {} if self._known is None else {"known": self._known.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Strategy.load_state_dict`."""
        known = state.get("known")
        if known is not None and (known.dtype != torch.bool or known.ndim != 1):
            raise ValueError(f"known classes of {known.dtype} and shape {tuple(known.shape)}")
        self._known = known

    def regularizer(self, replayed: Sequence[Part]) -> Tensor | None:
        """See `Strategy.regularizer`: the distance on the first draw, over the classes known at the time."""
        if not replayed:
            return None
        part = replayed[0]
        known = part.state["known"]
        return self.config.alpha * (self._checked_scores(part.outputs) - part.state["scores"])[known].square().mean()

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """See `Strategy.loss`."""
        scores, labels = self._checked_scores(new.outputs), new.targets[0] if new.targets else None
        if labels is None or labels.dtype != torch.int64 or labels.ndim != 1:
            raise BatchError("strategy 'x-der' needs int64 class labels [rows] as the first target")
        if self._known is None:
            self._known = torch.zeros(scores.shape[1], dtype=torch.bool, device="cpu")
        self._known = self._known.to(scores.device)  # a checkpoint loads it into host memory
        self._known[labels[labels >= 0]] = True  # negative labels are ignored by the loss
        return super().loss(new, replayed)

    def refresh(self, part: Part) -> dict[str, Tensor]:
        """See `Strategy.refresh`."""
        assert self._known is not None  # `loss` comes first
        recorded, known, labels = part.state["scores"], part.state["known"], part.targets[0]
        new_classes = self._known & ~known
        present = self._checked_scores(part.outputs).detach()
        limit = self.config.gamma * recorded.gather(1, labels.clamp(min=0)[:, None]).clamp(min=0)
        highest = present.masked_fill(~new_classes, 0).amax(1, keepdim=True).clamp(min=torch.finfo(present.dtype).tiny)
        scaled = present * (limit / highest).clamp(max=1)
        return {"scores": torch.where(new_classes, scaled, recorded), "known": known | self._known}

    def _checked_scores(self, outputs: Any) -> Tensor:
        (scores, *others) = self.tensors(outputs).values()
        if others or scores.ndim != 2:
            raise BatchError(
                "strategy 'x-der' needs one output, scores [rows, classes]; see rehearsal.strategy.outputs"
            )
        return scores
