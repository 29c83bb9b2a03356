"""Rows of different length in checkpoints: their own bytes on the disk, and jobs that go on bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rehearsal_plugin import LocalTransport, Rehearsal
from rehearsal_plugin.checkpoint.format import list_files, read_file, write_file
from rehearsal_plugin.checkpoint.record import rows_for_rank
from rehearsal_plugin.checkpoint.tools import export, inspect, reshard
from rehearsal_plugin.errors import CheckpointError

LENGTH, LONG = 128, 100
PADDING: dict[str, Any] = {"length": LENGTH, "values": {"tokens": 0, "labels": -100}}


def batch(step: int) -> dict[str, Tensor]:
    """Four texts, one of them long."""
    rng = np.random.default_rng(step)
    lengths = [*rng.integers(1, 20, 3).tolist(), LONG if step % 3 == 0 else 5]
    width = max(lengths)
    tokens, labels = torch.zeros(4, width, dtype=torch.int64), torch.full((4, width), -100)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.from_numpy(rng.integers(1, 99, length))
        labels[row, :length] = tokens[row, :length]
    return {"tokens": tokens, "labels": labels}


@contextmanager
def job(**section: Any) -> Iterator[Rehearsal]:
    settings = {"buffer": {"capacity": 60}, "representatives": 2, "padding": PADDING, **section}
    with Rehearsal(settings, LocalTransport()) as rehearsal:
        yield rehearsal


def train(rehearsal: Rehearsal, start: int, stop: int) -> list[Tensor]:
    return [rehearsal.update(batch(step))["tokens"] for step in range(start, stop)]


def alike(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in the background": {"checkpoint": {"asynchronous": True}},
    "incremental": {"checkpoint": {"incremental": True}},
    "incremental in the background": {"checkpoint": {"incremental": True, "asynchronous": True}},
    "bytes": {"buffer": {"capacity": "64KiB"}},
    "pairs": {"rows_per_sample": 2},
    "a file": {"buffer": {"capacity": 60, "storage": "mmap"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_job_goes_on_bit_for_bit(way: str, tmp_path: Path) -> None:
    section = dict(WAYS[way])
    if way == "a file":
        section["buffer"] = {**section["buffer"], "path": str(tmp_path / "rows")}
    with job(**section) as first:
        train(first, 0, 20)
        first.save(tmp_path / "a")
        train(first, 20, 40)  # rows come and go, and move, while the last save may be under way
        first.save(tmp_path / "a")
        first.flush()
        expected = train(first, 40, 60)
    with job(**section) as second:
        second.load(tmp_path / "a")
        assert alike(train(second, 40, 60), expected)
    with job(**section) as third:
        third.load(tmp_path / "a", step=20)
        train(third, 20, 40)
        assert alike(train(third, 40, 60), expected)


def test_a_file_holds_the_bytes_of_the_rows(tmp_path: Path) -> None:
    with job() as rehearsal:
        train(rehearsal, 0, 30)
        rehearsal.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    assert tensors["buffer.rows"].ndim == 1
    assert len(tensors["buffer.rows"]) == int(tensors["buffer.rows.lengths"].sum()) * 16
    found = inspect(tmp_path)
    assert found["rows"] == len(tensors["buffer.rows.lengths"]) == 60
    assert found["bytes"] == len(tensors["buffer.rows"])
    assert found["row_bytes"] == 16 * LENGTH, "of the longest"


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_are_shared_out_and_put_together(ranks: int, tmp_path: Path) -> None:
    with job() as rehearsal:
        train(rehearsal, 0, 30)
        rehearsal.save(tmp_path / "one")
    reshard([tmp_path / "one"], tmp_path / "many", ranks)
    reshard([tmp_path / "many"], tmp_path / "again", 1)
    texts = []
    for folder in ("one", "again"):
        files = [(tmp_path / folder, file) for file in list_files(tmp_path / folder)]
        rows = rows_for_rank(files, 0, 1)
        assert rows is not None
        texts.append(sorted(map(tuple, rows.rows.read_all()[:].tolist())))
    assert texts[0] == texts[1]
    with job() as other:
        other.load(tmp_path / "many")
        assert other.buffer is not None
        assert len(other.buffer) == 60
        assert export(tmp_path / "many", tmp_path / "rows.safetensors") == 60


def test_rows_that_do_not_fit_the_bytes_are_cut_by_chance(tmp_path: Path) -> None:
    with job(buffer={"capacity": 400}) as rehearsal:
        train(rehearsal, 0, 100)
        rehearsal.save(tmp_path)
    with job(buffer={"capacity": "64KiB"}) as small:
        small.load(tmp_path)
        assert small.buffer is not None
        loaded = len(small.buffer)
        assert 32 < loaded < 400  # 32 rows of the longest
        train(small, 100, 160)
        assert abs(len(small.buffer) - loaded) < 0.2 * loaded


@pytest.mark.parametrize("fault", ["a length", "the sum of lengths", "a byte less"])
def test_rows_that_contradict_their_lengths_are_refused(fault: str, tmp_path: Path) -> None:
    with job() as rehearsal:
        train(rehearsal, 0, 10)
        rehearsal.save(tmp_path)
    (file,) = list_files(tmp_path)
    content = read_file(tmp_path, file)
    lengths = content.tensors["buffer.rows.lengths"]
    if fault == "a length":
        lengths[:2] = torch.tensor([LENGTH + 1, lengths[0] + lengths[1] - LENGTH - 1])
    elif fault == "the sum of lengths":
        lengths[0] += 1
    else:
        content.tensors["buffer.rows"] = content.tensors["buffer.rows"][:-1].clone()
    write_file(tmp_path, file, content)
    with job() as rehearsal, pytest.raises(CheckpointError, match="contradicts itself"):
        rehearsal.load(tmp_path)


def test_documents_of_another_longest_length_are_refused_with_that_length(tmp_path: Path) -> None:
    def flat(length: int) -> dict[str, Tensor]:
        return {"input_ids": torch.ones(1, length, dtype=torch.int64), "position_ids": torch.arange(length)[None]}

    with job(padding=None) as rehearsal:
        rehearsal.update(flat(40_000))  # so up to 262,144 tokens are stored
        rehearsal.save(tmp_path)
    section: dict[str, Any] = {"buffer": {"capacity": 60, "preload": str(tmp_path)}}
    with (
        job(**section, padding=None) as other,
        pytest.raises(CheckpointError, match=r"padding\.length to 262144, give"),
    ):
        other.update(flat(5))
    with job(**section, padding={"length": 262_144}) as other:
        other.update(flat(5))
        assert other.buffer is not None
        assert len(other.buffer) == 2
