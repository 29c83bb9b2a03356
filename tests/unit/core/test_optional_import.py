"""Imports of optional packages: the module where it is there, else an error that says what to install."""

from __future__ import annotations

import json.decoder
import sys

import pytest

from rehearsal_plugin import MissingDependencyError
from rehearsal_plugin.core.optional_import import optional_import


def test_an_installed_module_is_returned() -> None:
    assert optional_import("json.decoder", extra="arrow") is json.decoder


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        optional_import("no_such_package.part", extra="arrow")
    assert str(caught.value) == "no_such_package is not installed; pip install 'rehearsal_plugin[arrow]'"
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_the_message_says_who_needs_it_and_another_way() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        optional_import("no_such_package", extra="arrow", needed_by="rows.parquet", hint="export to .safetensors")
    assert str(caught.value) == (
        "rows.parquet needs no_such_package, which is not installed; pip install 'rehearsal_plugin[arrow]', "
        "or export to .safetensors"
    )


def test_a_package_that_pip_cannot_install_has_its_own_hint() -> None:
    with pytest.raises(MissingDependencyError, match=r"^Framework is not installed; build it with build\.sh$"):
        optional_import("no_such_package", name="Framework", hint="build it with build.sh")


def test_a_package_that_cannot_be_loaded_is_missing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json.decoder", None)
    with pytest.raises(MissingDependencyError, match=r"^json is not installed"):
        optional_import("json.decoder", extra="arrow")
