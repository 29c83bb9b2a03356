"""Jobs on a pipeline engine of DeepSpeed: samples with ids, and the rows that each stage was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rehearsal_plugin
from tests.helpers.witness import MADE, config_of, payload, samples

__all__ = ["GAS", "SECTION", "Job", "batch_of", "pipeline_of"]

GAS = 2
SECTION = {
    "buffer": {"capacity": 200, "partition_by": "1"},
    "ratio": 0.25,
    "mode": "replace",
    "exchange": {"timeout_s": 20},
}
ADAM = {"type": "Adam", "params": {"torch_adam": True, "lr": 0.02}}


def batch_of(number: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs from which the labels can be learnt, labels, and what tells the samples apart."""
    uid = samples(number, rank=rank)["uid"]
    return inputs_of(uid), uid % 4, uid


def inputs_of(uid: Tensor) -> Tensor:
    return nn.functional.one_hot(uid % 4, 6).float() + payload(uid, torch.float32)["x"] / 970


class Job:
    """A pipeline engine, its batches, and what the stage of this rank was given.

    Attributes:
        seen: The `uid` of the rows of every micro-batch in training.
        evaluated: Those in evaluation.
        torn: Rows whose fields do not belong together.
        losses: Of every step.
    """

    def __init__(self, section: dict[str, Any], *, stages: int = 2, gas: int = GAS, **how: Any) -> None:
        self.seen: list[list[int]] = []
        self.evaluated: list[list[int]] = []
        self.losses: list[float] = []
        self.torn = self.number = 0
        self.gas = gas
        self.engine = pipeline_of(config_of(None, gas=gas, optimizer=ADAM), stages, **how)
        self.attach(section)

    def attach(self, section: dict[str, Any]) -> None:
        self.engine.batch_fn = None
        rehearsal_plugin.attach(self.engine, section)
        self._inject, self.engine.batch_fn = self.engine.batch_fn, self.noted

    @property
    def place(self) -> int:
        return int(self.engine.grid.get_data_parallel_rank())

    def train(self, steps: int, owner: int | None = None) -> None:
        for _ in range(steps):
            batches = self.batches(self.place if owner is None else owner)
            self.losses.append(self.engine.train_batch(iter(batches)).item())

    def batches(self, owner: int) -> list[Any]:
        self.number += self.gas
        return [batch_of(self.number - i, owner) for i in range(self.gas)]

    def outcome(self) -> dict[str, Any]:
        """Rows and counts of this stage; ends the engine."""
        self.engine.destroy()
        metrics = {name: value for name, value in self.engine.rehearsal.metrics().items() if not name.endswith("_ms")}
        names = ("place", "seen", "evaluated", "torn", "losses")
        return {**{name: getattr(self, name) for name in names}, "metrics": metrics}

    def noted(self, batch: Any) -> Any:
        inputs, labels, uid = micro_batch = batch if self._inject is None else self._inject(batch)
        (self.seen if self.engine.module.training else self.evaluated).append(uid.tolist())
        self.torn += int(((inputs != inputs_of(uid)).any(1) | (labels != uid % 4)).sum())
        return micro_batch


class Layer(nn.Module):
    """A layer of a stage; those of torch itself are not compiled alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def pipeline_of(config: dict[str, Any], stages: int, *, dynamic: bool = False, both_ways: bool = False) -> Any:
    """A pipeline engine without rehearsal; `both_ways` gives each rank two stages, as DualPipeV does."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    deepspeed.init_distributed()
    torch.manual_seed(0)
    chain = [Layer(6, 16), Layer(16, 16), Layer(16, 16), nn.Linear(16, 10)]
    make = DualPipeVModule if both_ways else PipelineModule
    model = make(
        chain, num_stages=stages, loss_fn=nn.functional.cross_entropy, partition_method="uniform", dynamic_shape=dynamic
    )
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    MADE.append(engine)
    return engine
