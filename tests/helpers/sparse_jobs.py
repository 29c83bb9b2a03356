"""Jobs whose micro-batches may have no rows, in every way that rows reach a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.integrations.handle import Handle
from rehearsal_plugin.integrations.horovod.handle import HorovodHandle
from rehearsal_plugin.integrations.inject.forward import ForwardInjection
from tests.unit.runtime.test_zero_rows import CLASSES, PHASES, SECTIONS, STEPS, WIDTH, batch

__all__ = ["JOBS", "SparseModel", "batches", "criterion", "section_of"]


def criterion(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over rows; 0 of none."""
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))


class SparseModel(nn.Module):
    """Scores of rows, or of their tokens; with its loss where it gets labels, unless `outside`."""

    def __init__(self, outside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.tokens = nn.Linear(WIDTH, CLASSES), nn.Embedding(9, CLASSES)
        self.outside = outside

    def forward(
        self, labels: Tensor | None = None, x: Tensor | None = None, tokens: Tensor | None = None, **_: Tensor
    ) -> Any:
        logits = self.linear(x) if x is not None else self.tokens(tokens).sum(1)
        if labels is None:
            return {"logits": logits}
        return (logits, labels) if self.outside else {"loss": criterion(logits, labels), "logits": logits}


def section_of(name: str, amount: Mapping[str, Any]) -> dict[str, Any]:
    return {"buffer": {"capacity": 20}, **SECTIONS[name], **amount}


def batches(name: str, phase: str) -> Iterator[list[dict[str, Tensor]]]:
    """The micro-batches of each step."""
    torch.manual_seed(0)
    for sizes in itertools.islice(itertools.cycle(PHASES[phase]), STEPS):
        yield [{**batch(rows, SECTIONS[name]), "labels": torch.randint(0, CLASSES, (rows,))} for rows in sizes]


def backward(loss: Tensor) -> None:
    if loss.grad_fn is not None:
        loss.backward()  # type: ignore[no-untyped-call]


def at_forward(name: str, phase: str, amount: Mapping[str, Any], *, outside: bool = False) -> dict[str, float]:
    """Rows injected at the model's forward."""
    model = SparseModel(outside)
    with Rehearsal(section_of(name, amount), LocalTransport()) as rehearsal:
        ForwardInjection(rehearsal, model).register()
        for micro_batches in batches(name, phase):
            for fields in micro_batches:
                outputs = model(**fields)
                backward(rehearsal.loss(criterion, *outputs) if outside else outputs["loss"])
            rehearsal.step()
        rehearsal.drain()
        return rehearsal.metrics()


def at_forward_outside(name: str, phase: str, amount: Mapping[str, Any]) -> dict[str, float]:
    """The same, with the loss by `rehearsal.loss`."""
    return at_forward(name, phase, amount, outside=True)


def at_loader(name: str, phase: str, amount: Mapping[str, Any]) -> dict[str, float]:
    """Rows injected in the loader; with `mode: replace` it makes other micro-batches of the rows."""
    model = SparseModel(outside=True)
    with Rehearsal({**section_of(name, amount), "inject": "loader"}, LocalTransport()) as rehearsal:
        handle = Handle(rehearsal)
        read = itertools.chain.from_iterable(batches(name, phase))
        for number, fields in enumerate(handle.loader(read)):
            assert number < 1000, "the loader does not end"
            backward(handle.loss(criterion, *model(**fields)))
            rehearsal.step()
        rehearsal.drain()
        return rehearsal.metrics()


def under_horovod(name: str, phase: str, amount: Mapping[str, Any]) -> dict[str, float]:
    """The handle of a Horovod optimizer, whose step runs the hooks twice, nested."""
    model, handle = SparseModel(outside=True), HorovodHandle(None)
    handle.rehearsal = rehearsal = Rehearsal(section_of(name, amount), LocalTransport())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle.follow_steps(optimizer)
    ForwardInjection(rehearsal, model).register()
    with rehearsal:
        for micro_batches in batches(name, phase):
            for fields in micro_batches:
                backward(handle.loss(criterion, *model(**fields)))
            handle._depth = 1  # as within `DistributedOptimizer.step`
            optimizer.step()
        rehearsal.drain()
        return rehearsal.metrics()


JOBS: Mapping[str, Callable[[str, str, Mapping[str, Any]], dict[str, float]]] = {
    "forward": at_forward,
    "forward, loss outside": at_forward_outside,
    "loader": at_loader,
    "horovod": under_horovod,
}
