"""What the README shows is what runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from rehearsal_plugin import RehearsalConfig
from rehearsal_plugin.config import find_block
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
DOCS = "".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_runs_as_it_stands() -> None:
    (example,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "'rows_replayed': 392" in done.stdout  # 98 steps of 4


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL))
def test_the_examples_of_the_docs_run_as_they_stand(example: str) -> None:
    subprocess.run([sys.executable, "-c", example], check=True, timeout=120)


def test_the_config_block_is_valid() -> None:
    (block,) = blocks("json")
    assert RehearsalConfig.load(json.loads(block)).ratio == 0.05


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:scripts|configs|docs)/[\w./]+\w", README))))
def test_every_file_that_it_names_exists(path: str) -> None:
    assert (ROOT / path).is_file()


def test_every_config_that_is_shipped_is_valid() -> None:
    for path in (ROOT / "configs").iterdir():
        assert find_block(path) is not None, path
        RehearsalConfig.load(path)


def test_the_table_names_every_key() -> None:
    shown = README.partition("## The block")[2].partition("## What works")[0]
    sections = RehearsalConfig().model_dump()
    names = {name for key, value in sections.items() for name in (value if isinstance(value, dict) else [key])}
    missing = {name for name in names - {"name"} if name not in shown}
    assert not missing, missing
