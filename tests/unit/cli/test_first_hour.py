"""The command `rehearsal` in the first hour: version, examples, folders as frameworks write them, sizes of rows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import rehearsal_plugin
from rehearsal_plugin import Rehearsal, cli
from rehearsal_plugin.checkpoint import tools
from rehearsal_plugin.cli.examples import EXAMPLES
from rehearsal_plugin.distributed.transport import LocalTransport
from tests.helpers.samples import new_batch
from tests.unit.cli.test_cli import STEPS, call, made

PLAN = ["--ranks", "8", "--step-ms", "300", "--batch", "8"]


def test_the_version_is_told() -> None:
    assert call("--version") == f"rehearsal_plugin {rehearsal_plugin.__version__}\n"


@pytest.mark.parametrize("command", sorted(EXAMPLES))
def test_help_ends_with_an_example(command: str) -> None:
    shown = " ".join(call(command, "--help").split())
    for example in EXAMPLES[command].splitlines():
        assert example in shown


def test_every_command_has_examples() -> None:
    assert {info.callback.__name__ for info in cli.app.registered_commands if info.callback} == set(EXAMPLES)


@pytest.mark.parametrize("line", [line for text in EXAMPLES.values() for line in text.splitlines()])
def test_an_example_is_a_call_that_the_command_takes(line: str) -> None:
    program, name, *arguments = shlex.split(line)
    assert program == "rehearsal"
    group: Any = typer.main.get_command(cli.app)
    group.commands[name].make_context(name, arguments)  # raises where an option or an argument is wrong


def test_what_a_model_needs_is_marked() -> None:
    shown = " ".join(call("seed", "--help").replace("│", " ").split())
    assert "needs --rows and --length" in shown


# --- folders as frameworks write them --------------------------------------------------------------------------------


def test_the_folder_that_latest_names_is_looked_into(tmp_path: Path) -> None:
    made(tmp_path / "global_step4", steps=4)
    made(tmp_path / "global_step8")
    (tmp_path / "latest").write_text("global_step4\n")
    assert json.loads(call("inspect", tmp_path, "--json"))["step"] == 4


def test_the_highest_checkpoint_of_a_trainer_is_looked_into(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        made(tmp_path / f"checkpoint-{step}", steps=step)
    (tmp_path / "checkpoint-11").mkdir()  # saved after the rehearsal was closed
    assert json.loads(call("inspect", tmp_path, "--json"))["step"] == 10


def test_files_of_the_folder_itself_go_first(tmp_path: Path) -> None:
    made(tmp_path, steps=3)
    made(tmp_path / "checkpoint-8")
    assert json.loads(call("inspect", tmp_path, "--json"))["step"] == 3


@pytest.mark.parametrize("name", ["../elsewhere", "/", "", "missing"])
def test_latest_leads_to_no_folder_elsewhere(name: str, tmp_path: Path) -> None:
    made(tmp_path / "elsewhere")
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "latest").write_text(name)
    with pytest.raises(rehearsal_plugin.CheckpointError, match="nor have the folders that 'latest' or checkpoint-"):
        tools.inspect(folder)


def test_all_commands_on_checkpoints_find_them(tmp_path: Path) -> None:
    made(tmp_path / "job" / "checkpoint-8")
    assert call("export", tmp_path / "job", tmp_path / "rows.safetensors").startswith(f"{STEPS * 6} rows")
    assert call("reshard", tmp_path / "job", tmp_path / "out", "--ranks", 2).startswith(f"{STEPS * 6} rows")


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def section(tmp_path: Path) -> Path:
    path = tmp_path / "rehearsal.yaml"
    path.write_text("buffer: {capacity: 1000}\nratio: 0.25\n")
    return path


def test_a_plan_counts_the_bytes_of_a_row_by_its_fields(section: Path) -> None:
    fields = {"x": "float64[3]", "half": "bfloat16", "odd": "bool", "id": "int64", "label": "int64"}
    options = [part for name, kind in fields.items() for part in ("--field", f"{name}={kind}")]
    estimate = json.loads(call("plan", section, *PLAN, *options, "--json"))
    with Rehearsal({"buffer": {"capacity": 10}}, LocalTransport()) as rehearsal:
        rehearsal.update(new_batch(0, 0, 4))
        assert rehearsal.buffer is not None
        assert estimate["row_bytes"] == rehearsal.buffer.layout.row_bytes


def test_a_plan_takes_the_bytes_of_a_row_from_a_checkpoint(section: Path, tmp_path: Path) -> None:
    made(tmp_path / "job")
    assert json.loads(call("plan", section, *PLAN, "--rows-of", tmp_path / "job", "--json"))["row_bytes"] == 96


@pytest.mark.parametrize("options", [[], ["--row-bytes", "96", "--field", "x=int64"]])
def test_a_plan_needs_the_bytes_of_a_row_once(section: Path, options: list[str]) -> None:
    told = call("plan", section, *PLAN, *options, code=2)
    assert re.search(r"--row-bytes.*--field.*--rows-of", " ".join(told.replace("│", " ").split()))


@pytest.mark.parametrize("field", ["x", "x=int65", "x=int64[", "x=int64[a]", "=int64", "x=int64[-1]"])
def test_a_field_is_a_name_a_dtype_and_a_shape(section: Path, field: str) -> None:
    assert "--field takes NAME=DTYPE" in call("plan", section, *PLAN, "--field", field, code=2)


def plan_lines(section: Path, *options: Any) -> list[str]:
    return call("plan", section, *PLAN, "--row-bytes", "16KiB", *options).splitlines()


def test_a_plan_says_first_what_links_it_assumes(section: Path) -> None:
    assert plan_lines(section)[0].startswith("Assumed: --links h100-ndr")
    assert plan_lines(section, "--links", "a100-hdr")[0].startswith("Assumed: --links a100-hdr")


def test_no_line_of_a_plan_is_wider_than_the_terminal(section: Path) -> None:
    arguments = ["plan", str(section), *PLAN, "--row-bytes", "16KiB"]
    shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100"}).output
    assert shown
    assert max(map(len, shown.splitlines())) <= 100
