"""Rows that were padded otherwise are refused by the key that changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.checkpoint.format import RankFile, read_file, write_file
from rehearsal_plugin.errors import CheckpointError

PADDING: dict[str, Any] = {"length": 6, "values": {"ids": 0.0}}


def job(padding: Any = PADDING, **buffer: Any) -> Rehearsal:
    section = {"buffer": {"capacity": 20, **buffer}, "representatives": 2, "padding": padding}
    return Rehearsal(section, LocalTransport())


def train(rehearsal: Rehearsal, steps: int) -> None:
    for step in range(steps):
        rehearsal.update({"ids": torch.full((4, 3 + step % 3), 7)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with job() as rehearsal:
        train(rehearsal, 5)
        rehearsal.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("padding", "key"),
    [
        ({**PADDING, "values": {"ids": -100.0}}, r"rehearsal.padding.values \{'ids': 0.0\}"),
        ({**PADDING, "length": 9}, "rehearsal.padding.length 6 "),
        ({**PADDING, "length": 5}, "rehearsal.padding.length 6 "),
        (None, "rehearsal.padding.length 6 "),
    ],
)
def test_another_padding_is_refused_by_key(padding: Any, key: str, folder: Path) -> None:
    with job(padding) as rehearsal, pytest.raises(CheckpointError, match=key):
        rehearsal.load(folder)
    with job(padding, preload=str(folder)) as rehearsal, pytest.raises(CheckpointError, match=key):
        train(rehearsal, 2)


def test_the_same_padding_goes_on(folder: Path) -> None:
    with job() as rehearsal:
        rehearsal.load(folder)
        train(rehearsal, 3)
        assert rehearsal.steps == 8


def test_the_length_of_a_checkpoint_holds_where_none_is_named(folder: Path) -> None:
    with job({"values": PADDING["values"]}) as rehearsal:
        rehearsal.load(folder)
        train(rehearsal, 3)
        assert rehearsal.steps == 8
        assert rehearsal.padding is not None
        assert rehearsal.padding.length == PADDING["length"]


def test_a_file_that_does_not_name_its_padding_goes_on(folder: Path) -> None:
    file = RankFile(5, 1, 0)
    content = read_file(folder, file)
    unnamed = {**content.meta, "job": {k: v for k, v in content.meta["job"].items() if k != "padding"}}
    write_file(folder, file, type(content)(unnamed, content.tensors))
    with job() as rehearsal:
        rehearsal.load(folder)
        train(rehearsal, 1)
        assert rehearsal.metrics()["steps"] == 6
