"""The reliability report, and that its table names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from scripts.benchmarks import reliability
from tests.helpers.paths import ROOT

DOC = (ROOT / "docs" / "results" / "reliability.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOC)


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_tables_names_a_test() -> None:
    rows = [line for line in DOC.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) == len(NAMED) > 30


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_every_test_that_is_named_is_there(path: str, name: str) -> None:
    assert name in functions(path)


def test_every_file_of_faults_is_named() -> None:
    files = {f"tests/reliability/{path.name}" for path in (ROOT / "tests/reliability").glob("test_fa*.py")}
    assert files <= {path for path, _ in NAMED}


ENDS = {"passed": "", "failure": '<failure message="no"/>', "skipped": '<skipped message="no device"/>'}


def case(name: str, end: str = "passed", **counted: int) -> str:
    """A test as JUnit writes it."""
    properties = "".join(f'<property name="{key}" value="{value}"/>' for key, value in counted.items())
    return f'<testcase classname="t" name="{name}"><properties>{properties}</properties>{ENDS[end]}</testcase>'


JUNIT = "".join(
    (
        case("one", faults=1, rows_lost=0),
        case("two", "failure", faults=1, rows_lost=3),
        case("three", "skipped", faults=1),
        case("four", inputs_fuzzed=120),
        case("five", inputs_fuzzed=8),
        case("six", steps_soaked=1000),
    )
)


def test_the_report_adds_up_what_the_tests_counted(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(f"<testsuites><testsuite>{JUNIT}</testsuite></testsuites>")
    rows = reliability.rows_of(path)
    assert [row["end"] for row in rows] == ["passed", "failure", "skipped", "passed", "passed", "passed"]
    assert reliability.summary_of(rows) == {
        "faults_tried": 2,
        "faults_survived": 1,
        "inputs_fuzzed": 128,
        "steps_soaked": 1000,
        "rows_lost": 3,
    }


FORBIDDEN = re.compile(
    r"\bpickle\b|\bmarshal\b|\bshelve\b|torch\.load\b|yaml\.(?!safe_load|YAMLError)\w*load|(?<![.\w])eval\(|(?<![.\w])exec\(|os\.system|shell=True"
)


@pytest.mark.parametrize("path", sorted((ROOT / "rehearsal_plugin").rglob("*.py")), ids=lambda path: path.name)
def test_nothing_runs_what_a_file_says(path: Path) -> None:
    code = "\n".join(ast.unparse(node) for node in ast.parse(path.read_text()).body if not is_docstring(node))
    assert not FORBIDDEN.findall(code)


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
