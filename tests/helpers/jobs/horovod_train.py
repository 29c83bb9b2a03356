"""A Horovod training script of the usual kind; it notes what it read, and what its model was given."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

TEST = 1_000_000  # ids of test samples begin here


class Model(nn.Module):
    def __init__(self, computes_loss: bool) -> None:
        super().__init__()
        self.linear, self.computes_loss = nn.Linear(3, 5), computes_loss
        self.rows: list[int] = []

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.training:
            self.rows.append(len(x))
        scores: Tensor = self.linear(x / 100)
        return scores if y is None or not self.computes_loss else nn.functional.cross_entropy(scores, y)


def dataset(start: int, size: int) -> TensorDataset:
    ids = torch.arange(start, start + size)
    return TensorDataset(ids[:, None] * torch.tensor([1.0, 2.0, 3.0]), ids % 5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--loss", choices=["inside", "outside"], required=True)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    hvd.init()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, test = dataset(0, 64), dataset(TEST, 24)
    sampler: DistributedSampler[object] = DistributedSampler(train, hvd.size(), hvd.rank())
    train_loader = DataLoader(train, batch_size=8, sampler=sampler)
    test_loader = DataLoader(test, batch_size=7)
    model = Model(arguments.loss == "inside")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    note: dict[str, list[list[int]]] = {"train": [], "labels": [], "test": []}
    for epoch in range(arguments.epochs):
        model.train()
        sampler.set_epoch(epoch)
        for x, y in train_loader:
            note["train"].append(x[:, 0].long().tolist())
            note["labels"].append(y.tolist())
            loss = model(x, y) if model.computes_loss else nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        for x, y in test_loader:
            note["test"].append(x[:, 0].long().tolist())
            with torch.no_grad():
                model(x, y)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    alike = hvd.allgather(weights[None])
    identical = bool((alike == alike[0]).all())
    note_of_rank = {**note, "rows": model.rows, "identical": identical, "argv": sys.argv, "path": sys.path[0]}
    (arguments.out / f"rank{hvd.rank()}.json").write_text(json.dumps(note_of_rank))


if __name__ == "__main__":
    main()
