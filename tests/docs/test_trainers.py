"""The pages on trainers: links, settings and code are right, and the table names the tests that there are."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from rehearsal_plugin import RehearsalConfig
from scripts.clients.page import build
from scripts.clients.scenarios import CELLS, SCENARIOS, TOOLS, Tool
from tests.helpers.paths import ROOT

PAGES = sorted((ROOT / "docs" / "guides" / "trainers").glob("*.md"))
WRITTEN = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = json.loads((ROOT / "docs" / "results" / "clients.json").read_text())
TESTS = [(tool, name) for cells in CELLS.values() for tool, cell in cells.items() for name in cell.tests]


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub names them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", path.read_text()):
        page = path if not target else (path.parent / target).resolve()
        assert page.exists(), target
        assert not anchor or page.suffix != ".md" or anchor in anchors(page), (target, anchor)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_sections_are_valid(path: Path) -> None:
    sections = re.findall(r"```json\n(.*?)```", path.read_text(), re.DOTALL)
    for section in map(json.loads, sections):
        RehearsalConfig.load({"buffer": {"capacity": 10}, **section})


def test_the_methods_for_lightning_are_those_of_the_tested_module() -> None:
    tested = (ROOT / "tests/helpers/clients/jobs/lightning_ddp.py").read_text()
    (shown,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs/guides/trainers/lightning.md").read_text(), re.DOTALL)
    lines = {line.strip() for line in tested.splitlines()}
    assert [line for line in shown.splitlines() if line.strip() and line.strip() not in lines] == []


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.environment + tool.name)
def test_each_tool_has_its_page_and_its_pins(tool: Tool) -> None:
    assert (ROOT / "docs" / "guides" / "trainers" / tool.page).is_file()
    assert (ROOT / "tests" / "clients" / f"{tool.environment}.txt").is_file()
    assert tool.environment in (ROOT / "scripts" / "test_clients.sh").read_text()


@pytest.mark.parametrize("name", sorted({name for _, name in TESTS}))
def test_the_tests_behind_a_cell_are_there(name: str) -> None:
    path, _, test = name.partition("::")
    if not test:
        assert (ROOT / path).exists()
        return
    functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert any(function.startswith(test.partition("[")[0]) for function in functions)


@pytest.mark.parametrize("environment", sorted(RESULTS))
def test_every_outcome_stands_behind_a_cell(environment: str) -> None:
    beginnings = tuple(name for tool, name in TESTS if tool.environment == environment)
    assert [test for test in RESULTS[environment]["tests"] if not test.startswith(beginnings)] == []


def test_a_cell_says_what_its_tests_did(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    test = "tests/clients/axolotl/test_train.py::test_rows_are_replayed[text]"
    for outcome, word in (("passed", "works"), ("failed", "fails")):
        results = {"axolotl": {"versions": {"axolotl": "9.8.7"}, "tests": {test: outcome}}}
        (tmp_path / "results" / "clients.json").write_text(json.dumps(results))
        table = build(tmp_path).read_text().partition("## What works")[2]
        heads, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
        column = next(place for place, head in enumerate(heads) if "9.8.7" in head)
        assert len(lines) == len(SCENARIOS)
        assert (lines[0][column + 1], lines[1][column + 1]) == (word, "not run")
