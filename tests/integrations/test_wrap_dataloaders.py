"""Every `DataLoader` of a script that is left as it is: training batches get rows, all others pass through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rehearsal_plugin import Rehearsal
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.integrations.inject.wrap_dataloaders import wrap_data_loaders

SIZES = [3, 7, 5, 1]


@pytest.fixture(params=["append", "replace"])
def rehearsal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rehearsal]:
    monkeypatch.setattr(DataLoader, "__iter__", DataLoader.__iter__)  # so that it is undone
    section = {"inject": "loader", "mode": request.param, "representatives": 2, "buffer": {"capacity": 1000}}
    with Rehearsal(section, LocalTransport()) as rehearsal:
        yield rehearsal


@pytest.fixture
def model(rehearsal: Rehearsal) -> nn.Module:
    model = nn.Linear(1, 1)
    wrap_data_loaders(rehearsal, model)
    return model


def loader(start: int, sizes: list[int], **options: Any) -> DataLoader[Any]:
    ids = torch.arange(start, start + sum(sizes))
    batches = [chunk.tolist() for chunk in torch.split(ids - start, sizes)]
    return DataLoader(TensorDataset(ids), batch_sampler=batches, **options)


def read(batches: DataLoader[Any], rehearsal: Rehearsal, step: bool = False) -> list[list[int]]:
    seen = []
    for (ids,) in batches:
        seen.append(ids.tolist())
        if step:
            rehearsal.step()
    return seen


def plain(start: int) -> list[list[int]]:
    return [chunk.tolist() for chunk in torch.split(torch.arange(start, start + sum(SIZES)), SIZES)]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_an_evaluation_pass_through_whatever_their_sizes(
    rehearsal: Rehearsal, model: nn.Module, workers: int
) -> None:
    read(loader(0, [8] * 5), rehearsal, step=True)
    offered = rehearsal.metrics()["rows_offered"]
    model.eval()
    assert read(loader(1000, SIZES, num_workers=workers), rehearsal) == plain(1000)
    model.train()
    with torch.no_grad():
        assert read(loader(2000, SIZES), rehearsal) == plain(2000)
    rehearsal.step()
    assert rehearsal.metrics()["rows_offered"] == offered


def test_batches_of_an_evaluation_may_be_anything(rehearsal: Rehearsal, model: nn.Module) -> None:
    texts = ["a", "b", "c"]
    model.eval()
    assert list(DataLoader(texts, batch_size=2)) == [["a", "b"], ["c"]]  # type: ignore[arg-type]


def test_training_batches_get_rows_and_lose_none(rehearsal: Rehearsal, model: nn.Module) -> None:
    seen = read(loader(0, [8] * 6), rehearsal, step=True)
    new = [id for ids in seen for id in ids]
    assert set(new) == set(range(48))
    assert len(new) > 48
    if rehearsal.config.mode == "replace":
        assert all(len(ids) <= 8 for ids in seen)


def test_what_was_read_before_an_evaluation_in_the_middle_is_not_lost(rehearsal: Rehearsal, model: nn.Module) -> None:
    seen = []
    for number, (ids,) in enumerate(loader(0, [8] * 8)):
        seen.append(ids.tolist())
        rehearsal.step()
        model.train(number not in (4, 5))
    assert {id for ids in seen for id in ids} == set(range(64))
