"""Small jobs with a strategy, and a log of new and replayed rows with their state."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.strategies import Part, Strategy, register
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import Batch, new_batch, step_of

SIZE, WANTED, STEPS = 6, 4, 25


EXCHANGE = {"timeout_s": 20}


def section(name: str = "der", **keys: Any) -> dict[str, Any]:
    strategy = {"name": name, **keys.pop("strategy", {})}
    amount = {} if "ratio" in keys else {"representatives": WANTED}
    return {"buffer": {"capacity": 40}, "exchange": EXCHANGE, "strategy": strategy, **amount, **keys}


class Model(nn.Module):
    """Scores for the classes of a row; they change with every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear((x % 97).float() / 97)
        return scores


def loss_of(outputs: Any, label: Tensor, ids: Tensor) -> Tensor:
    scores = outputs if isinstance(outputs, Tensor) else outputs["scores"]
    return cross_entropy(scores, label)


@dataclass
class RankLog:
    """Log of the rows that one rank trained on.

    Attributes:
        given: Outputs of the model for each new row, by the row's id.
        draws: For each micro-batch the ids and the states of each draw.
        batches: Every micro-batch, with replayed rows.
        whole: Whether parts were always the micro-batch itself, cut at the right places.
        losses: Of each micro-batch.
    """

    given: dict[int, Tensor] = field(default_factory=dict)
    draws: list[list[tuple[list[int], dict[str, Tensor]]]] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    whole: bool = True
    losses: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def replayed(self) -> list[tuple[int, Tensor]]:
        """Every replayed row with its state, where that is one tensor."""
        return [
            (row, value)
            for draws in self.draws
            for ids, state in draws
            for row, value in zip(ids, *state.values(), strict=True)
        ]


def spy(strategy: Strategy) -> list[list[Part]]:
    """The parts that a strategy is given from now on."""
    calls: list[list[Part]] = []
    original = strategy.loss

    def loss(new: Part, replayed: Sequence[Part]) -> Tensor:
        calls.append([new, *replayed])
        return original(new, replayed)

    strategy.loss = loss  # type: ignore[method-assign]
    return calls


def train(
    *,
    steps: int = STEPS,
    passes: int = 1,
    model: Callable[[Tensor], Any] | None = None,
    transform: Callable[[Any], Any] | None = None,
    **keys: Any,
) -> RankLog:
    rank = dist.get_rank() if dist.is_initialized() else 0
    module, found = Model(), RankLog()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with Rehearsal(section(**keys), transform=transform) as rehearsal:
        calls = spy(rehearsal.strategy)
        for number in range(steps * passes):
            batch = rehearsal.augment(new_batch(rank, number, SIZE))
            outputs = (model or module)(batch["x"])
            loss = rehearsal.loss(loss_of, outputs, batch["label"], batch["id"])
            torch.autograd.backward(loss)
            note(found, batch, outputs, calls[-1], number)
            found.losses.append(loss.item())
            if number % passes == passes - 1:
                optimizer.step()
                optimizer.zero_grad()
                rehearsal.step()
    found.metrics = rehearsal.metrics()
    return found


def note(found: RankLog, batch: Batch, outputs: Any, parts: list[Part], number: int) -> None:
    ids = batch["id"].tolist()
    new = sum(step_of(row) == number for row in ids)
    if isinstance(outputs, Tensor):
        found.given.update(zip(ids[:new], outputs.detach().clone(), strict=False))
        found.whole &= torch.equal(torch.cat([part.outputs for part in parts]), outputs)
    found.whole &= torch.equal(torch.cat([part.targets[1] for part in parts]), batch["id"])
    found.whole &= parts[0].size == new
    found.draws.append([(part.targets[1].tolist(), dict(part.state)) for part in parts[1:]])
    found.batches.append(batch)


def owners(found: Sequence[RankLog]) -> dict[int, Tensor]:
    """What every row of every rank was answered with when it was new."""
    return {row: answer for one in found for row, answer in one.given.items()}


def check_states(found: Sequence[RankLog]) -> None:
    given = owners(found)
    for one in found:
        assert one.whole, "parts are not the micro-batch"
        assert one.replayed, "nothing was replayed"
        assert all(torch.equal(state, given[row]) for row, state in one.replayed)


@register("tests-surprise")
class Surprise(Strategy):
    """Records how surprised the model was by each row, and which class it took it for."""

    draws, records = 2, True

    def state(self, new: Part) -> dict[str, Tensor]:
        outputs = new.outputs
        return {"margin": outputs.amax(1) - outputs.mean(1), "class": outputs.argmax(1).to(torch.uint8)}

    def loss(self, new: Part, replayed: Sequence[Part]) -> Tensor:
        weights = [part.state["margin"].mean() for part in replayed]
        return sum((w * part.loss() for w, part in zip(weights, replayed, strict=True)), start=new.loss())


def on_ranks() -> bytes:
    """By value: tensors that go through a pipe as they are need a sender that stays alive."""
    rank = dist.get_rank()
    results = {
        "der": train(name="der"),
        "der++": train(name="der++", exchange={"launch": "thread", **EXCHANGE}),
        "inline": train(name="der++", exchange={"launch": "inline", **EXCHANGE}),
        "passes": train(name="der++", passes=2),
        "replace": train(name="der++", mode="replace", representatives=2),
        "topk": train(name="topk", strategy={"k": 2}),
        "own": train(name="tests-surprise"),
        "all": train(
            name="der", transform=lambda batch: {**batch, "x": batch["x"] + rank}, strategy={"transform": "all"}
        ),
    }
    return pickle.dumps(results)


@functools.cache
def ranks() -> list[dict[str, RankLog]]:
    return [pickle.loads(result) for result in run_ranks(on_ranks, 2, timeout_s=60)]


def started(name: str = "der", steps: int = 5, **keys: Any) -> Rehearsal:
    """A rehearsal that has come to replay, with a batch that waits for its loss."""
    rehearsal = Rehearsal(section(name, **keys), LocalTransport())
    for step in range(steps):
        batch = rehearsal.augment(new_batch(0, step, SIZE))
        rehearsal.loss(cross_entropy, Model()(batch["x"]), batch["label"])
        rehearsal.step()
    rehearsal.augment(new_batch(0, steps, SIZE))
    return rehearsal
