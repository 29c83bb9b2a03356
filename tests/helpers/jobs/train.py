"""A plain DeepSpeed training script; it notes how it was started and what its model was given."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import initialize
from torch import Tensor, nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build would take half a minute


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        loss: Tensor = self.linear(x).mean()
        return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fail", action="store_true")
    deepspeed.add_config_arguments(parser)
    arguments = parser.parse_args()
    model = Model()
    engine, *_ = initialize(args=arguments, model=model, model_parameters=model.parameters())
    for _ in range(5):
        engine.backward(engine(torch.ones(8, 4)))
        engine.step()
        if arguments.fail and len(model.sizes) == 4 and dist.get_rank() == 1:
            raise ValueError("told to fail")
    note = {"argv": sys.argv, "path": sys.path[0], "sizes": model.sizes, "main": sys.modules["__main__"].__file__}
    (arguments.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(note))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
