"""DER (dark experience replay): the outputs for replayed rows stay close to the recorded ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rehearsal_plugin.strategies.base import Part, Strategy, distance, register
from rehearsal_plugin.strategies.counted_loss import add_loss

__all__ = ["DarkExperienceReplay"]


@register("der")
class DarkExperienceReplay(Strategy):
    """The task's loss on new rows, plus alpha times the squared distance to the recorded outputs.

    Buzzega et al., "Dark experience for general continual learning", NeurIPS 2020. All tensors that the model
    returns are recorded and compared, so a generative model with several outputs is held by all of them.
    """

    reads = frozenset({"alpha", "outputs"})
    records = True
    relearns = False

    def state(self, new: Part) -> dict[str, Tensor]:
        """See `Strategy.state`."""
        return self.tensors(new.outputs)

    def regularizer(self, replayed: Sequence[Part]) -> Tensor | None:
        """See `Strategy.regularizer`: the distance on the first draw."""
        if not replayed:
            return None
        return self.config.alpha * distance(self.tensors(replayed[0].outputs), replayed[0].state)

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        """See `Strategy.loss`."""
        dark = self.regularizer(replayed)
        total = add_loss(dark, 1.0, new)
        return new.loss() if total is None else total
