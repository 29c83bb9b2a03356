"""Experience replay: replayed rows count like new ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rehearsal_plugin.strategies.base import Part, Strategy, register
from rehearsal_plugin.strategies.counted_loss import mean_over_rows

__all__ = ["ExperienceReplay"]


@register("er")
class ExperienceReplay(Strategy):
    """One loss over new and replayed rows, the replayed ones weighted by `loss_weight`.

    With `loss_weight: 1` that is the task's mean loss over all rows (Chaudhry et al., "On tiny episodic memories
    in continual learning", 2019).
    """

    reads = frozenset({"loss_weight"})

    @property
    def plain(self) -> bool:
        """See `Strategy.plain`."""
        return self.config.loss_weight == 1

    @property
    def replayed_weight(self) -> float:
        """See `Strategy.replayed_weight`."""
        return self.config.loss_weight

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """See `Strategy.loss`."""
        weight = self.config.loss_weight
        return mean_over_rows([(new, 1.0), *((part, weight) for part in replayed)])
