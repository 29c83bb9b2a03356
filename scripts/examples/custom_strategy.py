"""A strategy of your own: replayed rows are held to the probabilities that the model gave them when they were new.

    python -m scripts.examples.custom_strategy

prints

    without rehearsal: 0 % of the first task, 100 % of the second
    held to its word: 100 % of the first task, 100 % of the second
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.strategies import Part, Strategy, register
from scripts.common.two_tasks import STEPS, TASKS, batch_of, make_model, percent_right


@register("same_word")
class SameWord(Strategy):
    """The task's loss on all rows, and the divergence from recorded probabilities on replayed ones."""

    records = True  # beside each row lies what `state` returned, and comes back as `part.state`

    def state(self, new: Part) -> dict[str, Tensor]:
        return {"log_probabilities": new.outputs.log_softmax(dim=1)}

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        total = new.loss()
        for part in replayed:
            now, then = part.outputs.log_softmax(dim=1), part.state["log_probabilities"]
            drift = kl_div(now, then, reduction="sum", log_target=True) / max(1, part.size)
            total = total + part.loss() + self.config.alpha * drift
        return total


def train(strategy: str, ratio: float) -> torch.nn.Module:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Rehearsal({"buffer": {"capacity": 200}, "ratio": ratio, "strategy": {"name": strategy}}) as rehearsal:
        for step in range(TASKS * STEPS):
            batch = rehearsal.augment(batch_of(step // STEPS, step))
            loss = rehearsal.loss(cross_entropy, model(batch["points"]), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rehearsal.step()
    return model


if __name__ == "__main__":
    for name, strategy, ratio in (("without rehearsal", "er", 0.0), ("held to its word", "same_word", 0.25)):
        model = train(strategy, ratio)
        first, second = (percent_right(model, task) for task in range(TASKS))
        print(f"{name}: {first} of the first task, {second} of the second")
