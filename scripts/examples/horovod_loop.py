"""Horovod: one line after `hvd.DistributedOptimizer`.

    horovodrun -np 2 --gloo python -m scripts.examples.horovod_loop

prints

    rehearsal: 100 % of the first task, 100 % of the second
"""

from __future__ import annotations

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rehearsal_plugin
from scripts.common.two_tasks import STEPS, TASKS, batch_of, make_model, percent_right


class Classifier(nn.Module):
    """Computes its own loss, so replayed rows can join at its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = make_model()

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.scores(points), labels)


def main() -> None:
    hvd.init()
    model = Classifier()
    plain = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
    section = {"buffer": {"capacity": 200}, "ratio": 0.25}
    rehearsal = rehearsal_plugin.attach(optimizer, model=model, config=section)
    for step in range(TASKS * STEPS):
        optimizer.zero_grad()
        model(**batch_of(step // STEPS, step, hvd.rank())).backward()
        optimizer.step()
    rehearsal.close()
    if hvd.rank() == 0:
        first, second = (percent_right(model.scores, task) for task in range(TASKS))
        print(f"rehearsal: {first} of the first task, {second} of the second")
    hvd.shutdown()


if __name__ == "__main__":
    main()
