"""The tiny model and its data, made once, and the file of results."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
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
OUTCOMES = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `model` and data; see `tests.helpers.clients.tiny_llm`."""
    from tests.helpers.clients.tiny_llm import make_tiny_llm

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_llm(folder)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or not report.passed:
        note(item.config.stash[OUTCOMES], item.nodeid, report.outcome)
    return report


def note(outcomes: dict[str, str], test: str, outcome: str) -> None:
    """Note the outcome of a test; those that other environments run, too, are noted by their file."""
    name = test if test.startswith("tests/clients/") else test.partition("::")[0]
    outcomes[name] = outcome if outcomes.get(name) in (None, "passed", "skipped") else outcomes[name]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the outcomes under the name of the environment, where the script asks for them."""
    place = os.environ.get("CLIENT_RESULTS")
    if place is None or not session.config.stash[OUTCOMES]:
        return
    path = Path(place)
    results = json.loads(path.read_text()) if path.is_file() else {}
    results[os.environ["CLIENT_NAME"]] = {
        "versions": {name: metadata.version(name) for name in TOOLS if is_installed(name)},
        "tests": dict(sorted(session.config.stash[OUTCOMES].items())),
    }
    path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
