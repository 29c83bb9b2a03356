"""A plain loop under DDP: two calls around yours, and all ranks share one buffer.

    torchrun --nproc_per_node 2 -m scripts.examples.ddp

prints

    without rehearsal: 0 % of the first task, 100 % of the second
    with rehearsal: 100 % of the first task, 100 % of the second
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from rehearsal_plugin import Rehearsal
from scripts.common.two_tasks import STEPS, TASKS, batch_of, make_model, percent_right


def train(ratio: float) -> torch.nn.Module:
    """Learn one task after the other, with that share of replayed rows in each batch."""
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Rehearsal({"buffer": {"capacity": 200}, "ratio": ratio}) as rehearsal:
        for step in range(TASKS * STEPS):
            batch = rehearsal.augment(batch_of(step // STEPS, step, dist.get_rank()))  # new rows, then replayed ones
            optimizer.zero_grad()
            cross_entropy(model(batch["points"]), batch["labels"]).backward()
            optimizer.step()
            rehearsal.step()
    return model


def main() -> None:
    dist.init_process_group("gloo")
    for name, ratio in (("without", 0.0), ("with", 0.25)):
        model = train(ratio)
        if dist.get_rank() == 0:
            first, second = (percent_right(model, task) for task in range(TASKS))
            print(f"{name} rehearsal: {first} of the first task, {second} of the second", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
