"""Fields that rows carry and the model does not get."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.core.tree import without
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.integrations.inject.forward import ForwardInjection
from rehearsal_plugin.integrations.inject.loader import RehearsalLoader

SECTION: dict[str, Any] = {
    "buffer": {"capacity": 100, "partition_by": "domain"},
    "hidden": ["domain"],
    "representatives": 3,
}


def new_batch(step: int, size: int = 6) -> dict[str, Tensor]:
    ids = step * size + torch.arange(size)
    return {"x": torch.stack((ids, ids * 2), 1).float(), "domain": ids % 2}


class Model(nn.Module):
    """Knows of no domain."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def test_update_hides_them_and_counts_by_them() -> None:
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        seen = [rehearsal.update(new_batch(step)) for step in range(10)]
        metrics = rehearsal.metrics()
    assert {tuple(batch) for batch in seen} == {("x",)}
    assert len(seen[-1]["x"]) == 9
    assert metrics["rows_stored/0"] == metrics["rows_stored/1"] == 30
    assert metrics["rows_replayed/0"] > 0
    assert metrics["rows_replayed/1"] > 0


def test_the_batch_that_was_given_keeps_them() -> None:
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        batch = new_batch(0)
        rehearsal.update(batch)
    assert sorted(batch) == ["domain", "x"]


def test_a_models_forward_never_gets_them_not_even_in_evaluation() -> None:
    model = Model()
    with Rehearsal(SECTION, LocalTransport()) as rehearsal:
        injection = ForwardInjection(rehearsal, model)
        for step in range(6):
            args, kwargs = injection((), new_batch(step))
            model(*args, **kwargs)
            rehearsal.step()
        assert len(kwargs["x"]) == 9
        model.eval()
        args, kwargs = injection((), new_batch(9))
        assert model(*args, **kwargs).shape == (6, 1)
    args, kwargs = injection((), new_batch(10))
    assert sorted(kwargs) == ["x"], "after the end, too"


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_loader_gives_batches_without_them(mode: str) -> None:
    with Rehearsal({**SECTION, "inject": "loader", "mode": mode}, LocalTransport()) as rehearsal:
        active = iter([True] * 7 + [False] * 100)
        loader = RehearsalLoader([new_batch(step) for step in range(8)], rehearsal, active=lambda: next(active))
        for batch in loader:
            assert sorted(batch) == ["x"]
            rehearsal.step()


@pytest.mark.parametrize(
    ("tree", "names", "rest"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, ["b.c"], {"a": 1, "b": {"d": 3}}),
        ((1, {"a": 2}, 3), ["0", "1.a"], ({}, 3)),
        ([1, 2, 3], ["1"], [1, 3]),
        (MappingProxyType({"a": 1, "b": 2}), ["a"], {"b": 2}),
        (5, ["a"], 5),
    ],
)
def test_any_nesting_loses_them(tree: Any, names: list[str], rest: Any) -> None:
    found = without(tree, names)
    assert (dict(found) if isinstance(found, Mapping) else found) == rest
