"""Hosts for the tests; without them the tests are skipped, and say why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hosts.network import Network, refusal

REFUSAL = refusal() if os.environ.get("REHEARSAL_HOSTS") else "hosts are made by scripts/test_hosts.sh"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where there can be no hosts."""
    for item in items:
        if REFUSAL is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REFUSAL))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[[int], Network]]:
    """Makes a network of so many hosts."""
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(Network(tmp_path / "hosts", count))


@pytest.fixture
def out(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder for the results of a job."""

    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make
