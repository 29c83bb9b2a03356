"""Rows of different length: what the commands make of a checkpoint in which they are stored without their padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.feather as feather
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from rehearsal_plugin import Rehearsal, cli
from rehearsal_plugin.cli.doctor import machine
from rehearsal_plugin.cli.row_size import RowSize, row_size
from rehearsal_plugin.distributed.transport import LocalTransport

LENGTHS = (3, 7, 5)
POSITIONS = 32768
FIXED, POSITION_BYTES = 16, 24
"""Bytes of a row beside its tokens, and of each token with mask and label."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    with Rehearsal({"buffer": {"capacity": 100}, "representatives": 2, "padding": {}}, LocalTransport()) as rehearsal:
        for number, length in enumerate(LENGTHS):
            tokens = torch.full((4, length), number)
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
            rehearsal.update({**batch, "id": torch.full((4,), number)})
        rehearsal.save(folder)
    return folder


def call(*arguments: Any) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_what_is_stored_and_what_travels_are_told_apart(checkpoint: Path) -> None:
    size = row_size(None, [], checkpoint)
    assert size == RowSize(FIXED + 5 * POSITION_BYTES, FIXED + 16 * POSITION_BYTES, FIXED + POSITIONS * POSITION_BYTES)
    assert (size.held("memory"), size.held("cuda")) == (size.stored, size.padded)
    assert row_size("64", [], None) == RowSize(64, 64, 64)


def test_a_plan_counts_stored_rows_without_their_padding(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "section.json"
    config.write_text(json.dumps({"buffer": {"capacity": 100_000}, "ratio": 0.2}))
    options = ["--ranks", 2, "--step-ms", 200, "--batch", 20, "--rows-of", checkpoint]
    plan = json.loads(call("plan", config, *options, "--json"))
    assert plan["buffer_bytes"] == 100_000 * plan["stored_bytes"] == 100_000 * (FIXED + 5 * POSITION_BYTES)
    assert plan["row_bytes"] == FIXED + 16 * POSITION_BYTES
    assert "136 B in the buffer; as long as the longest on its way: 400 B" in call("plan", config, *options)


def test_a_doctor_finds_room_for_them(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 1 << 30)
    config = tmp_path / "section.json"
    config.write_text(json.dumps({"buffer": {"capacity": 100_000}, "ratio": 0.2}))
    found = json.loads(call("doctor", config, "--rows-of", checkpoint, "--json"))
    assert [finding["level"] for finding in found if finding["topic"] == "memory"] == ["fine"]


@pytest.mark.parametrize("ending", ["safetensors", "arrow"])
def test_an_export_is_as_wide_as_the_longest_row(checkpoint: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    call("export", checkpoint, path)
    if ending == "arrow":
        found = {name: torch.tensor(column) for name, column in feather.read_table(str(path)).to_pydict().items()}
    else:
        found = load_file(path)
    lengths = torch.tensor(LENGTHS)[found["id"]]
    inside = torch.arange(max(LENGTHS)) < lengths[:, None]
    ids = found["id"][:, None].expand_as(inside)
    assert torch.equal(found["attention_mask"], inside.long())
    assert torch.equal(found["labels"], torch.where(inside, ids, -100))
    assert torch.equal(found["input_ids"], torch.where(inside, ids, 0))
