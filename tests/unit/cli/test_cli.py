"""The command `rehearsal`: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from rehearsal_plugin import Rehearsal, cli
from rehearsal_plugin.checkpoint import format as files
from rehearsal_plugin.checkpoint import tools
from rehearsal_plugin.checkpoint.format import Content, RankFile
from rehearsal_plugin.checkpoint.record import rows_for_rank
from rehearsal_plugin.distributed.transport import LocalTransport
from rehearsal_plugin.errors import CheckpointError, MissingDependencyError
from tests.helpers.samples import Batch, new_batch, same
from tests.helpers.seat import Seat

SIZE, STEPS = 6, 8
COMMAND = Path(sys.executable).with_name("rehearsal")


def made(folder: Path, ranks: int = 1, steps: int = STEPS, fields: Any = dict, **keys: Any) -> Path:
    """A checkpoint of `ranks` ranks."""
    keys = {"buffer": {"capacity": 100, "partition_by": "label"}, **keys}
    section = {"representatives": 4, "sampling": {"scope": "local"}, **keys}
    for rank in range(ranks):
        with Rehearsal(section, Seat(rank, ranks)) as rehearsal:
            for step in range(steps):
                batch = rehearsal.augment(fields(new_batch(rank, step, SIZE)))
                if rehearsal.strategy.records:
                    rehearsal.loss(cross_entropy, batch["x"].float().repeat(1, 2), batch["label"])
                rehearsal.step()
            rehearsal.save(folder)
    return folder


def rows(folder: Path) -> Batch:
    """All rows of a checkpoint, by their ids."""
    taken = rows_for_rank(tools.newest_files(folder), 0, 1)
    assert taken is not None
    batch: Batch = taken.layout.unpack(taken.rows.read_all()[:])
    return sorted_by_id(batch)


def sorted_by_id(batch: Batch) -> Batch:
    return {name: value[batch["id"].argsort()] for name, value in batch.items()}


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_is_there(tmp_path: Path) -> None:
    made(tmp_path, ranks=2)
    found = json.loads(call("inspect", tmp_path, "--json"))
    batches = [new_batch(rank, step, SIZE) for rank in range(2) for step in range(STEPS)]
    labels = Counter(torch.cat([batch["label"] for batch in batches]).tolist())
    by_partition = {str(key): count for key, count in sorted(labels.items())}
    assert found == {
        "step": STEPS,
        "ranks": 2,
        "rows": 2 * STEPS * SIZE,
        "bytes": 2 * STEPS * SIZE * 96,
        "row_bytes": 96,
        "sent_bytes": 96,
        "fields": [
            ["x", "torch.float64", [3]],
            ["half", "torch.bfloat16", []],
            ["odd", "torch.bool", []],
            ["id", "torch.int64", []],
            ["label", "torch.int64", []],
        ],
        "state": [],
        "job": {
            "capacity": 100,
            "policy": "reservoir",
            "partition_by": "label",
            "score_by": None,
            "deduplicate": False,
            "weights": "uniform",
            "scope": "local",
            "strategy": "er",
            "outputs": None,
            "k": 16,
            "draws": 1,
            "records": False,
        },
        "whole": True,
        "rows_by_rank": [STEPS * SIZE] * 2,
        "rows_by_partition": by_partition,
        "offered_by_partition": by_partition,
        "rows_by_origin": {"0": STEPS * SIZE, "1": STEPS * SIZE},
        "age_steps": [1.0, 2.75, 4.5, 6.25, 8.0],
    }


def test_inspect_counts_what_was_turned_away_too(tmp_path: Path) -> None:
    made(tmp_path, buffer={"capacity": 10, "partition_by": "label"})
    found = json.loads(call("inspect", tmp_path, "--json"))
    assert found["rows"] == sum(found["rows_by_partition"].values()) == 10
    assert sum(found["offered_by_partition"].values()) == STEPS * SIZE


def test_inspect_shows_tables(tmp_path: Path) -> None:
    made(tmp_path, ranks=2, strategy={"name": "der"})
    shown = call("inspect", tmp_path)
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert f"step {STEPS}, 2 ranks, {2 * STEPS * SIZE} rows of 128 bytes (0.0 MiB)" in lines
    assert "a job of as many ranks goes on bit for bit; policy reservoir, strategy der" in lines
    assert "age in steps, quartiles: 1 / 2.75 / 4.5 / 6.25 / 8" in lines
    assert "x float64 [3]" in lines
    assert "output (recorded) float32 [6]" in lines
    assert "0 32 32" in lines
    assert f"1 {STEPS * SIZE} {STEPS * SIZE}" in lines


@pytest.mark.parametrize("name", ["a[/b]", "[red]", "[/]", ":smile:", "x\\[b]"])
def test_fields_may_be_called_anything(name: str, tmp_path: Path) -> None:
    made(tmp_path, fields=lambda batch: {**batch, name: batch["id"]})
    assert name in call("inspect", tmp_path)


def test_inspect_of_a_checkpoint_before_any_batch(tmp_path: Path) -> None:
    made(tmp_path, steps=0)
    found = json.loads(call("inspect", tmp_path, "--json"))
    assert (found["rows"], found["fields"], found["age_steps"], found["rows_by_rank"]) == (0, [], [], [0])
    assert "0 rows" in call("inspect", tmp_path)


# --- reshard and merge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_reshard_shares_out_all_rows(ranks: int, tmp_path: Path) -> None:
    source, out = made(tmp_path / "source", ranks=3), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert call("reshard", source, out, "--ranks", ranks) == f"{3 * STEPS * SIZE} rows for {ranks} ranks in {out}\n"
    found = tools.inspect(out)
    assert max(found["rows_by_rank"]) - min(found["rows_by_rank"]) <= 1
    assert found["rows_by_origin"] == dict.fromkeys(range(3), STEPS * SIZE)
    assert (found["step"], found["ranks"], found["whole"]) == (STEPS, ranks, False)
    assert same(rows(source), rows(out))
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in out.iterdir())


def test_a_job_takes_over_what_was_resharded(tmp_path: Path) -> None:
    made(tmp_path / "source", ranks=3)
    call("reshard", tmp_path / "source", tmp_path / "out", "--ranks", 1)
    with Rehearsal({"buffer": {"capacity": 500}, "representatives": 4}, LocalTransport()) as rehearsal:
        rehearsal.load(tmp_path / "out")
        assert rehearsal.buffer is not None
        assert len(rehearsal.buffer) == 3 * STEPS * SIZE
        assert [len(rehearsal.update(new_batch(0, STEPS + step, SIZE))["id"]) for step in range(3)] == [6, 6, 10]


@pytest.mark.parametrize(("policy", "left"), [("reservoir", {0: 8, 1: 1, 2: 1}), ("balanced", {0: 4, 1: 3, 2: 3})])
def test_reshard_to_less_room_goes_by_the_policy(policy: str, left: dict[int, int], tmp_path: Path) -> None:
    labels = torch.tensor([0] * 80 + [1] * 10 + [2] * 10)
    buffer = {"capacity": 200, "partition_by": "label", "policy": policy}
    with Rehearsal({"buffer": buffer, "representatives": 4}, LocalTransport()) as rehearsal:
        rehearsal.update({"id": torch.arange(100), "label": labels})
        rehearsal.save(tmp_path / "source")
    call("reshard", tmp_path / "source", tmp_path / "out", "--ranks", 1, "--capacity", 10)
    found = tools.inspect(tmp_path / "out")
    assert found["rows_by_partition"] == left
    assert sum(found["offered_by_partition"].values()) == 100


def test_reshard_to_more_ranks_than_rows(tmp_path: Path) -> None:
    made(tmp_path / "source", buffer={"capacity": 2})
    call("reshard", tmp_path / "source", tmp_path / "out", "--ranks", 4)
    assert sorted(tools.inspect(tmp_path / "out")["rows_by_rank"]) == [0, 0, 1, 1]


def test_merge_puts_checkpoints_together(tmp_path: Path) -> None:
    first = made(tmp_path / "first", ranks=2)
    other = made(tmp_path / "other", steps=5, fields=lambda batch: {**batch, "id": batch["id"] + 10**9})
    out = tmp_path / "out"
    shown = call("merge", first, other, "--out", out, "--ranks", 2)
    assert shown == f"{(2 * STEPS + 5) * SIZE} rows for 2 ranks in {out}\n"
    assert same(
        rows(out), sorted_by_id({name: torch.cat((rows(first)[name], value)) for name, value in rows(other).items()})
    )
    assert tools.inspect(out)["step"] == STEPS


def test_merge_refuses_rows_of_other_fields(tmp_path: Path) -> None:
    first = made(tmp_path / "first")
    other = made(tmp_path / "other", fields=lambda batch: {**batch, "x": batch["x"].float()})
    with pytest.raises(CheckpointError, match=r"float64.*float32|float32.*float64"):
        tools.reshard([first, other], tmp_path / "out", 1)


# --- export ----------------------------------------------------------------------------------------------------------


def columns(folder: Path) -> dict[str, Tensor]:
    """What an export has to hold, by ids."""
    taken = rows_for_rank(tools.newest_files(folder), 0, 1)
    assert taken is not None
    packed = taken.rows.read_all()[:]
    order = taken.layout.unpack(packed)["id"].argsort()
    fields = {field.name: field.view(packed) for field in (*taken.layout.fields, *taken.layout.state)}
    extra = {"rehearsal.step": torch.from_numpy(taken.written), "rehearsal.rank": torch.from_numpy(taken.origin)}
    return {name: value[order] for name, value in {**fields, **extra}.items()}


def test_export_to_safetensors_holds_every_value(tmp_path: Path) -> None:
    source, path = made(tmp_path / "source", ranks=2, strategy={"name": "der"}), tmp_path / "new" / "rows.safetensors"
    assert call("export", source, path) == f"{2 * STEPS * SIZE} rows in {path}\n"
    found, expected = load_file(path), columns(source)
    assert same(sorted_by_id(found), expected)
    ids = expected["id"].tolist()
    assert expected["rehearsal.rank"].tolist() == [row // 1_000_000 for row in ids]
    assert expected["rehearsal.step"].tolist() == [row % 1_000_000 // 100 for row in ids]


def test_export_to_arrow_holds_every_value(tmp_path: Path) -> None:
    source, path = made(tmp_path / "source", ranks=2, strategy={"name": "der"}), tmp_path / "rows.arrow"
    call("export", source, path)
    table, expected = feather.read_table(str(path)), columns(source)
    with pa.memory_map(str(path)) as file:
        assert pa.ipc.open_file(file).read_all().equals(table), "it is Arrow IPC"
    assert set(table.column_names) == set(expected)
    order = torch.tensor(table["id"].to_pylist()).argsort()
    for name, value in expected.items():
        got = torch.tensor(table[name].to_pylist())[order]
        assert torch.equal(got.to(value.dtype), value), name
    assert table.schema.field("x").type == pa.list_(pa.float64(), 3)
    assert table.schema.field("half").type == pa.float32()
    assert table.schema.field("odd").type == pa.bool_()
    assert table.schema.field("id").type == pa.int64()


@pytest.mark.parametrize("ending", ["safetensors", "arrow"])
def test_fields_of_several_dimensions_and_every_dtype(ending: str, tmp_path: Path) -> None:
    dtypes = [torch.float16, torch.float32, torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool]
    batch = {f"f{i}": (torch.arange(24) % 2).reshape(2, 3, 4).to(dtype) for i, dtype in enumerate(dtypes)}
    with Rehearsal({"buffer": {"capacity": 9}}, LocalTransport()) as rehearsal:
        rehearsal.update(batch)
        rehearsal.save(tmp_path)
    path = tmp_path / f"rows.{ending}"
    call("export", tmp_path, path)
    for name, value in batch.items():
        if ending == "arrow":
            got = torch.tensor(feather.read_table(str(path))[name].to_pylist())
            assert torch.equal(got.to(value.dtype), value.reshape(2, 12)), name
        else:
            assert torch.equal(load_file(path)[name], value), name


@pytest.mark.parametrize("ending", ["safetensors", "arrow"])
def test_what_was_recorded_hides_no_field_of_the_same_name(ending: str, tmp_path: Path) -> None:
    made(tmp_path, strategy={"name": "der"}, fields=lambda batch: {**batch, "output": -batch["id"]})
    path = tmp_path / f"rows.{ending}"
    call("export", tmp_path, path)
    found = load_file(path) if ending == "safetensors" else feather.read_table(str(path)).to_pydict()
    assert torch.equal(torch.as_tensor(found["output"]), -torch.as_tensor(found["id"]))
    assert len(found["recorded.output"][0]) == 6


def test_without_pyarrow_the_other_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"rehearsal_plugin\[arrow\].*\.safetensors"):
        tools.export(tmp_path, tmp_path / "rows.arrow")


# --- failures --------------------------------------------------------------------------------------------------------


def failing(folder: Path) -> dict[str, list[Any]]:
    """Calls that cannot work, by what they say."""
    source = made(folder / "source")
    empty = made(folder / "empty", steps=0)
    broken = made(folder / "broken")
    for path in broken.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    partial = made(folder / "partial", ranks=2)
    (partial / RankFile(STEPS, 2, 1).name).unlink()
    forged = made(folder / "forged")
    place = RankFile(STEPS, 1, 0)
    content = files.read_file(forged, place)
    files.write_file(forged, place, Content({**content.meta, "count": "many"}, content.tensors))
    (folder / "file").write_text("in the way")
    return {
        "no rehearsal checkpoint": ["inspect", folder / "missing"],
        "cannot be read": ["inspect", broken],
        "is missing": ["reshard", partial, folder / "out", "--ranks", 1],
        "many": ["merge", source, forged, "--out", folder / "out"],
        "nothing to export": ["export", empty, folder / "rows.arrow"],
        "ends in neither": ["export", source, folder / "rows.csv"],
        "rows.safetensors cannot be written": ["export", source, folder / "file" / "rows.safetensors"],
        "rows.arrow cannot be written": ["export", source, folder / "file" / "rows.arrow"],
        "is a directory": ["export", source, folder / "dir.arrow"],
        "Not a directory": ["reshard", source, folder / "file" / "out", "--ranks", 1],
    }


def test_problems_are_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dir.arrow").mkdir()
    for message, arguments in failing(tmp_path).items():
        monkeypatch.setattr(sys, "argv", ["rehearsal", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        assert caught.value.code == 1
        assert out == ""
        assert err.startswith("rehearsal: ")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("ending", ["safetensors", "arrow"])
def test_a_dtype_that_a_format_has_not_is_told_too(ending: str, tmp_path: Path) -> None:
    made(tmp_path, fields=lambda batch: {**batch, "c": torch.zeros(len(batch["id"]), dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match="cannot be written"):
        tools.export(tmp_path, tmp_path / f"rows.{ending}")


def test_wrong_arguments_are_explained() -> None:
    for arguments in (["reshard", "a", "b"], ["reshard", "a", "b", "--ranks", "0"], ["merge", "a"], ["nonsense"]):
        assert "Usage" in call(*arguments, code=2)


def test_the_command_is_there_and_fails_as_commands_do(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    (done, failed) = (
        subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
        for arguments in (["inspect", source, "--json"], ["inspect", tmp_path / "[none]"])
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == STEPS * SIZE
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.splitlines() == [
        f"rehearsal: {tmp_path}/[none] has no rehearsal checkpoint (rehearsal-step*-rank*-of-*.safetensors), nor have "
        "the folders that 'latest' or checkpoint-* name in it; give the folder of a checkpoint"
    ]
