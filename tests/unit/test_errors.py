"""The tree of exceptions: one base for all, and the builtin that each refines."""

from __future__ import annotations

import pytest

import rehearsal_plugin
from rehearsal_plugin import errors

BUILTINS = {
    "BatchError": ValueError,
    "CheckpointError": ValueError,
    "ClosedError": RuntimeError,
    "ConfigError": ValueError,
    "DataError": ValueError,
    "ExchangeError": RuntimeError,
    "ExchangeTimeout": TimeoutError,
    "ForgettingError": RuntimeError,
    "MissingDependencyError": ImportError,
    "StorageError": OSError,
}


def test_every_exception_is_in_the_list() -> None:
    assert {*BUILTINS, "RehearsalError"} == set(errors.__all__)


@pytest.mark.parametrize("name", BUILTINS)
def test_an_exception_can_be_caught_as_that_of_the_package_and_as_the_builtin(name: str) -> None:
    kind = getattr(errors, name)
    with pytest.raises(errors.RehearsalError, match="cause"):
        raise kind("cause")
    assert issubclass(kind, BUILTINS[name])


def test_a_timeout_is_a_failed_exchange() -> None:
    assert issubclass(errors.ExchangeTimeout, errors.ExchangeError)


@pytest.mark.parametrize("name", sorted(set(errors.__all__) & set(rehearsal_plugin.__all__)))
def test_the_package_exports_the_same_class(name: str) -> None:
    assert getattr(rehearsal_plugin, name) is getattr(errors, name)
