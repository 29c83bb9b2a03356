"""DeepSpeed: a block in its config, and one line after `deepspeed.initialize`.

    deepspeed --num_gpus 2 --module scripts.examples.deepspeed_engine

prints, among DeepSpeed's own lines,

    rehearsal: 100 % of the first task, 100 % of the second
    of the rows that rank 0 saw, 25 % were replayed

Without a GPU set DS_ACCELERATOR=cpu before.
"""

from __future__ import annotations

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rehearsal_plugin
from scripts.common.two_tasks import STEPS, TASKS, batch_of, make_model, percent_right

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build would take half a minute

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    "rehearsal": {"buffer": {"capacity": 200}, "ratio": 0.25},
}


class Classifier(nn.Module):
    """Computes its own loss, so replayed rows can join at its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = make_model()

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.scores(points), labels)


def main() -> None:
    model = Classifier()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    rehearsal = rehearsal_plugin.attach(engine)
    for step in range(TASKS * STEPS):
        engine.backward(engine(**batch_of(step // STEPS, step, dist.get_rank())))
        engine.step()
    if dist.get_rank() == 0:
        first, second = (percent_right(model.scores, task) for task in range(TASKS))
        print(f"rehearsal: {first} of the first task, {second} of the second")
        replayed = rehearsal.metrics()["rows_replayed"]
        print(f"of the rows that rank 0 saw, {100 * replayed / (replayed + 16 * TASKS * STEPS):.0f} % were replayed")
    engine.destroy()


if __name__ == "__main__":
    main()
