"""Loops of Accelerate and of Lightning Fabric: one call a step, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from rehearsal_plugin import Rehearsal
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import ids_of, intact, samples

SIZE, WANTED, STEPS = 6, 4, 15
SECTION: dict[str, Any] = {"buffer": {"capacity": 60}, "representatives": WANTED, "exchange": {"timeout_s": 20}}


class Samples(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 2 * SIZE * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: field[0] for name, field in samples(torch.tensor([index])).items()}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.layer((x % 97).float() / 97)
        return scores


def told(seen: list[dict[str, torch.Tensor]], model: nn.Module) -> dict[str, Any]:
    """What a rank's batches were, and its parameters."""
    return {
        "intact": all(map(intact, seen)),
        "own": [one for batch in seen for one in batch["id"][:SIZE].tolist()],
        "replayed": [ids_of(batch, SIZE) for batch in seen],
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
    }


def with_accelerate() -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Samples(), batch_size=SIZE, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    with Rehearsal(SECTION) as rehearsal:
        for batch in loader:
            augmented = rehearsal.update(batch)
            accelerator.backward(cross_entropy(model(augmented["x"]), augmented["label"]))
            optimizer.step()
            optimizer.zero_grad()
            seen.append(augmented)
    return told(seen, accelerator.unwrap_model(model))


def with_fabric() -> dict[str, Any]:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = Model()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(Samples(), batch_size=SIZE, shuffle=True))
    seen = []
    with Rehearsal(SECTION) as rehearsal:
        for batch in loader:
            augmented = rehearsal.update(batch)
            fabric.backward(cross_entropy(model(augmented["x"]), augmented["label"]))
            optimizer.step()
            optimizer.zero_grad()
            seen.append(augmented)
    return told(seen, model)


LOOPS = {"accelerate": with_accelerate, "lightning_fabric": with_fabric}


def elastic(name: str) -> dict[str, Any]:
    """As torchrun starts a rank."""
    import os

    os.environ |= {"TORCHELASTIC_RUN_ID": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(dist.get_world_size())}
    return LOOPS[name]()


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_replays_rows_of_both_ranks(name: str) -> None:
    pytest.importorskip(name)
    ranks = run_ranks(elastic, 2, name, timeout_s=90)
    own = [set(rank["own"]) for rank in ranks]
    assert not own[0] & own[1], "each rank has data of its own"
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
    for rank in ranks:
        assert rank["intact"]
        assert [len(one) for one in rank["replayed"]] == [0, 0] + [WANTED] * (STEPS - 2)
        replayed = {one for step in rank["replayed"] for one in step}
        assert replayed & own[0]
        assert replayed & own[1]
