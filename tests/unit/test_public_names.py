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


@pytest.mark.parametrize("name", rehearsal_plugin.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(rehearsal_plugin, name).__name__ == name
    assert name in dir(rehearsal_plugin)


@pytest.mark.parametrize("name", sorted(rehearsal_plugin._PACKAGES))
def test_every_package_is_an_attribute(name: str) -> None:
    assert getattr(rehearsal_plugin, name).__name__ == f"rehearsal_plugin.{name}"


def test_a_name_is_listed_where_it_is_found() -> None:
    assert {*rehearsal_plugin._HOMES, "initialize"} == set(rehearsal_plugin.__all__)


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'reharsal'"):
        rehearsal_plugin.reharsal  # noqa: B018
