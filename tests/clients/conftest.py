"""The tiny model and its data, made once, and the file of results."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

TOOLS = (
    "accelerate",
    "axolotl",
    "datasets",
    "deepspeed",
    "lightning",
    "llamafactory",
    "ms_swift",
    "peft",
    "torch",
    "transformers",
    "trl",
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `model` and data; see `tests.helpers.clients.tiny_llm`."""
    from tests.helpers.clients.tiny_llm import make_tiny_llm

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_llm(folder)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    place = os.environ.get("CLIENT_RESULTS")
    if place is not None:
        config.pluginmanager.register(Outcomes(Path(place), os.environ["CLIENT_NAME"]))


class Outcomes:
    """Notes the outcomes of tests, also of those in other folders, which the hooks of a `conftest.py` do not reach.

    Args:
        path: File to write.
        environment: Under whose name.
    """

    def __init__(self, path: Path, environment: str) -> None:
        self._path, self._environment = path, environment
        self._by_test: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one; those of tests that other environments run, too, by their file."""
        if report.when != "call" and report.passed:
            return
        test = report.nodeid
        name = test if test.startswith("tests/clients/") else test.partition("::")[0]
        before = self._by_test.get(name)
        self._by_test[name] = report.outcome if before in (None, "passed", "skipped") else before

    def pytest_sessionfinish(self) -> None:
        """Write them all."""
        if not self._by_test:
            return
        results = json.loads(self._path.read_text()) if self._path.is_file() else {}
        results[self._environment] = {
            "versions": {name: metadata.version(name) for name in TOOLS if is_installed(name)},
            "tests": dict(sorted(self._by_test.items())),
        }
        self._path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
