"""The names of the package: imported on first use, and each where it is defined."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rehearsal_plugin

COUNTED = "import sys, rehearsal_plugin; print(sum(name.startswith('rehearsal_plugin') for name in sys.modules))"


def test_the_package_alone_imports_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1


@pytest.mark.parametrize("name", [*rehearsal_plugin.__all__, "RehearsalCallback"])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(rehearsal_plugin, name).__name__ == name
    assert name in dir(rehearsal_plugin)


@pytest.mark.parametrize("name", sorted(rehearsal_plugin._PACKAGES))
def test_every_package_is_an_attribute(name: str) -> None:
    assert getattr(rehearsal_plugin, name).__name__ == f"rehearsal_plugin.{name}"


def test_a_name_is_listed_where_it_is_found() -> None:
    assert {*rehearsal_plugin._HOMES, "initialize"} == {*rehearsal_plugin.__all__, "RehearsalCallback"}


def test_all_names_at_once_need_no_framework() -> None:
    code = "import sys; sys.modules['transformers'] = None; from rehearsal_plugin import *; print(Rehearsal.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "Rehearsal\n", done.stderr


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'reharsal'"):
        rehearsal_plugin.reharsal  # noqa: B018


FIRST = ["config", "buffer", "buffer.policies", "buffer.storage", "strategies", "distributed.transport", "checkpoint",
         "integrations", "rehearsal", "retrieval", "evaluation", "run", "cli", "errors"]  # fmt: skip


EACH_FIRST = """
import importlib, os, sys
import numpy, pydantic, torch, typer
assert "rehearsal_plugin" not in sys.modules
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(f"rehearsal_plugin.{name}")
        from rehearsal_plugin import RehearsalConfig
        os._exit(RehearsalConfig.load({}).strategy.name != "er")
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_every_package_can_be_the_first_and_then_a_section_can_be_read() -> None:
    """In processes of their own, as imports in another order may hide a circle; they share those of other libraries."""
    done = subprocess.run([sys.executable, "-c", EACH_FIRST, *FIRST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["RehearsalConfig", "Rehearsal", "attach"])
def test_a_public_name_alone_brings_all_that_a_section_names(name: str) -> None:
    code = f"from rehearsal_plugin import {name}; from rehearsal_plugin.config.registries import STRATEGIES as known"
    done = subprocess.run([sys.executable, "-c", f"{code}; print(*known)"], capture_output=True, text=True, check=True)
    assert {"er", "der", "topk"} <= set(done.stdout.split())
