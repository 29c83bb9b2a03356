"""Each example runs by the command in its header, and prints what stands there."""

from __future__ import annotations

import ast
import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from scripts.common.launch import free_port
from tests.helpers.paths import ROOT
from tests.helpers.script_runs import run_command

EXAMPLES = ROOT / "scripts" / "examples"
NEEDED = {
    "deepspeed_engine": "deepspeed",
    "hf_trainer": "transformers",
    "reporters": "transformers",
    "images_derpp": "sklearn",
}
CLIENTS = {"lightning_module": "lightning", "trl_sft": "trl"}
LAUNCHED = {"horovod_loop": "horovod"}
SHORT = ["custom_policy", "custom_strategy", "ddp", *NEEDED, *CLIENTS, *LAUNCHED]
"""All but the larger ones, which have tests of their own."""

pytestmark = pytest.mark.slow


def header(name: str) -> tuple[list[str], list[str]]:
    """The command of an example, and the lines that it prints."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())) or ""
    shown = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return shlex.split(shown[0]), shown[1:]


def with_a_free_port(command: list[str]) -> list[str]:
    """The command with a port that no other test has."""
    option = {"torchrun": "--master_port", "deepspeed": "--master_port"}.get(command[0])
    return command if option is None else [command[0], option, str(free_port()), *command[1:]]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[getattr(pytest.mark, mark) for mark in ("clients", "horovod") if name in marked[mark]]
        )
        for marked in [{"clients": CLIENTS, "horovod": LAUNCHED}]
        for name in SHORT
    ],
)
def test_an_example_prints_what_its_header_says(name: str, tmp_path: Path) -> None:
    library = {**NEEDED, **CLIENTS, **LAUNCHED}.get(name)
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    command, lines = header(name)
    folder = Path(sys.executable).parent
    program = folder / command[0]
    assert program.exists() or shutil.which(command[0]), command[0]
    paths = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | os.environ | paths
    status, printed = run_command(with_a_free_port(command), ROOT, environment, timeout_s=240)
    assert status == 0, printed
    told = [line for line in printed.splitlines() if any(line.strip().endswith(one) for one in lines)]
    assert len(told) == len(lines), printed
    assert all(line.endswith(expected) for line, expected in zip(told, lines, strict=True))


@pytest.mark.parametrize("name", SHORT)
def test_an_example_is_short_and_has_its_command_and_output(name: str) -> None:
    command, lines = header(name)
    assert f"scripts.examples.{name}" in command
    assert lines
    assert 30 <= (EXAMPLES / f"{name}.py").read_text().count("\n") <= 65


def test_every_short_example_is_run() -> None:
    others = {"__init__", "horovod_images", "horovod_images_results", "rag", "rag_questions"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - others == set(SHORT)
