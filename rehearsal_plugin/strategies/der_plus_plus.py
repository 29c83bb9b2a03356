"""DER++: dark experience replay, and the task's loss on a second draw."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rehearsal_plugin.strategies.base import Part, register
from rehearsal_plugin.strategies.counted_loss import add_loss
from rehearsal_plugin.strategies.der import DarkExperienceReplay

__all__ = ["DarkExperienceReplayPlusPlus"]


@register("der++")
class DarkExperienceReplayPlusPlus(DarkExperienceReplay):
    """Alpha times the distance on the first draw, beta times the task's loss on the second (Buzzega et al., 2020)."""

    reads = frozenset({"alpha", "beta", "outputs"})
    draws = 2
    relearns = True

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """See `Strategy.loss`."""
        total = add_loss(self.regularizer(replayed), 1.0, new)
        if len(replayed) > 1:
            total = add_loss(total, self.config.beta, replayed[1])
        return new.loss() if total is None else total
